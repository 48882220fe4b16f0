"""A stand-in for `workers.ray_entry`: it writes the same files, without torch and a dataset.

The run's `fake` field holds what it does: {"steps", "step_s", "fail", "class", "exit", "crash_at",
"hang_at", "once", "drift"}. It goes on from the last step of an earlier attempt and obeys SIGINT.
With "once" it fails in the first attempt alone. "drift" names a file that makes a metric differ
from run to run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from contract.attempt import ExitStatus, Outcome, Progress, Result


def main(path: str) -> int:
    spec = json.loads(Path(path).read_text())
    folder, attempt, plan = Path(spec["storage"]), spec.get("attempt", 1), spec["run"]["fake"]
    signals: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
    print(f"attempt {attempt} of {spec['trial']} as process {os.getpid()}", flush=True)
    (folder / f"attempts/{attempt}/rank-0.log").write_text(f"rank 0 of attempt {attempt}: grüße\n")
    (folder / f"attempts/{attempt}/pid").write_text(str(os.getpid()))
    checkpoint = folder / "checkpoints" / "step"
    checkpoint.parent.mkdir(exist_ok=True)
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    faulty = not plan.get("once") or attempt == 1
    steps = plan.get("steps", 3)

    def end(state: Any, code: int, step: int, error_class: Any = "none", error: str = "") -> int:
        outcome = Outcome(state=state, error_class=error_class, error=error, step=step)
        _write(folder / f"attempts/{attempt}/outcome.json", outcome.model_dump_json())
        return code

    for step in range(first, steps):
        progress = Progress(
            attempt=attempt, step=step, steps=steps, phase="training", updated_at=time.time()
        )
        _write(folder / "progress.json", progress.model_dump_json())
        checkpoint.write_text(str(step))
        if faulty and plan.get("fail") is not None and step >= plan.get("fail_at", 0):
            return end(
                "failed",
                plan.get("exit", ExitStatus.FAILED),
                step,
                plan.get("class", "unknown"),
                plan["fail"],
            )
        if faulty and step == plan.get("crash_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        gate = plan.get("gate")
        while (faulty and step == plan.get("hang_at")) or (gate and not Path(gate).exists()):
            if signals:
                return end("stopped", ExitStatus.STOPPED, step)
            time.sleep(0.02)
        time.sleep(plan.get("step_s", 0.0))
        if signals:
            return end("stopped", ExitStatus.STOPPED, step)
    metrics = {
        "segm/AP": 0.25 + spec["run"].get("seed", 0) / 100,
        "bbox/AP": 0.3,
        "images_per_s": time.time(),
    }
    if "drift" in plan:
        with Path(plan["drift"]).open("a") as file:
            file.write("x")
        metrics["bbox/AP"] += Path(plan["drift"]).stat().st_size / 1000
    result = Result(
        metrics=metrics,
        step=steps,
        attempt=attempt,
        world_size=spec.get("ranks", 1),
        weights_sha256="0" * 64,
    )
    _write(folder / "result.json", result.model_dump_json())
    return end("done", ExitStatus.DONE, steps)


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[sys.argv.index("--spec") + 1]))
