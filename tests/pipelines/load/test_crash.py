"""What a killed training process leaves behind: nothing."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

PROGRAM = """
import gc, json, sys
from multiprocessing.synchronize import SemLock
from contract.data import DataConfig
from pipelines.shards.dataset import open_dataset
from pipelines.load.loader import TrainLoader

if __name__ == "__main__":
    cfg = DataConfig(train=sys.argv[1], val="v", short_sides_px=(64,), num_loader_workers=2)
    stream = TrainLoader(cfg, open_dataset(cfg.train), seed=0, global_batch=4, rank=0, world_size=1,
                         max_images_per_forward=4, masks=True)
    batches = iter(stream)
    held = [next(batches) for _ in range(3)]
    names = [lock._semlock.name for lock in gc.get_objects() if isinstance(lock, SemLock)]
    print(json.dumps([name for name in names if name]), flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this system")
def test_a_killed_loader_leaves_no_process_and_no_shared_memory(shapes, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(shapes / "train")]
    root = Path(__file__).parents[3]
    main = subprocess.Popen(
        command,
        cwd=root,
        env={"PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert main.stdout is not None
    assert main.stdin is not None
    others: list[psutil.Process] = []
    try:
        semaphores = json.loads(main.stdout.readline())
        others = psutil.Process(main.pid).children(recursive=True)
        pids = [main.pid, *(process.pid for process in others)]
        assert len(others) >= 4, "a fork server, a resource tracker and two workers"
        main.send_signal(signal.SIGKILL)
        main.wait()
        _, alive = psutil.wait_procs(others, timeout=60)
    finally:
        for process in (main, *others):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        main.stdin.close()
        main.stdout.close()
    assert not alive
    left = {path.name for path in Path("/dev/shm").iterdir()}
    assert not {f"sem.{name.removeprefix('/')}" for name in semaphores} & left
    assert not [name for name in left for pid in pids if name.startswith(f"torch_{pid}_")]
