"""A stand-in for `workers.ray_entry` with real ranks: a placement group and an actor for each.

All ranks take every step; the last step is the checkpoint. It ends as the real entry does: a lost
rank has the class "node", a node that drains is a preemption. The run's `fake` field holds what it
does: {"steps", "gate", "gate_at", "crash_at"}; it crashes in the first attempt alone. A run without
that field goes to the real entry.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.exceptions import RayError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from contract.attempt import AttemptSpec, ExitStatus, Outcome, Progress, Result


class Rank:
    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def step(self) -> int:
        return os.getpid()


def main(path: str) -> int:
    data = json.loads(Path(path).read_text())
    run = data.pop("run")
    if "fake" not in run:
        os.execv(sys.executable, [sys.executable, "-m", "workers.ray_entry", "--spec", path])
    spec = AttemptSpec.model_validate(data)
    signals: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="warning")
    folder, attempt, plan = Path(spec.storage), spec.attempt, run["fake"]
    needs = {"CPU": spec.cpus_per_rank, "GPU": spec.gpus_per_rank, **spec.rank_resources}
    others = f"!in({','.join(spec.avoid_nodes)})"
    avoid = {"ray.io/node-id": others} if spec.avoid_nodes else None
    group = placement_group(
        [needs] * spec.ranks,
        strategy="STRICT_PACK" if spec.max_nodes == 1 else "PACK",
        bundle_label_selector=[avoid] * spec.ranks if avoid else None,
    )
    ray.get(group.ready(), timeout=120)
    actor = ray.remote(Rank)
    ranks = [
        actor.options(
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"],
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index
            ),
        ).remote()
        for index in range(spec.ranks)
    ]
    nodes = ray.get([rank.node.remote() for rank in ranks])
    (folder / f"attempts/{attempt}/nodes.json").write_text(json.dumps(nodes))
    checkpoint = folder / "checkpoints" / "step"
    checkpoint.parent.mkdir(exist_ok=True)
    steps, step = plan.get("steps", 4), int(checkpoint.read_text()) if checkpoint.exists() else 0

    def end(state: Any, code: int, error_class: Any = "none", error: str = "") -> int:
        outcome = Outcome(state=state, error_class=error_class, error=error, step=step)
        _write(folder / f"attempts/{attempt}/outcome.json", outcome.model_dump_json())
        return code

    gate = Path(plan["gate"]) if "gate" in plan else None
    while step < steps:
        try:
            ray.get([rank.step.remote() for rank in ranks], timeout=60)
        except RayError as error:
            return end("failed", ExitStatus.FAILED, "node", f"Ray: {type(error).__name__}")
        progress = Progress(
            attempt=attempt, step=step, steps=steps, phase="training", updated_at=time.time()
        )
        _write(folder / "progress.json", progress.model_dump_json())
        if attempt == 1 and step == plan.get("crash_at"):
            return end(
                "failed", ExitStatus.FAILED, "collective", "rank 1: connection closed by peer"
            )
        if signals:
            return end("stopped", ExitStatus.STOPPED)
        if not ray_state.get_draining_nodes().keys().isdisjoint(nodes):
            return end("preempted", ExitStatus.PREEMPTED)
        if step == plan.get("gate_at", 1) and gate is not None and not gate.exists():
            time.sleep(0.1)
            continue
        step += 1
        checkpoint.write_text(str(step))
    result = Result(
        metrics={"segm/AP": 0.5},
        step=step,
        attempt=attempt,
        world_size=len(ranks),
        weights_sha256="0" * 64,
    )
    _write(folder / "result.json", result.model_dump_json())
    return end("done", ExitStatus.DONE)


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[sys.argv.index("--spec") + 1]))
