"""What a study cost, and where its numbers come from."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from contract.answers import StudyView, TrialView
from contract.study import Study
from orchestrator.results.cells import Row, Table, arm_label
from orchestrator.results.comparison import Comparison
from orchestrator.results.facts import Facts
from orchestrator.results.trial_files import SeenRun

_SHORT = 12  # characters of a hash: enough to find it


def cost_table(facts: Facts, comparison: Comparison) -> Table:
    """A row for each arm: device-hours of all its attempts, its speed, and how often it restarted.

    A trial that took another one's result cost nothing here.
    """
    unit = "GPU-hours" if facts.study.resources.gpus_per_rank else "CPU-hours"
    rows = []
    for arm in comparison.arms:
        speeds = [t.metrics["images_per_s"] for t in arm.trials if "images_per_s" in t.metrics]
        taken = sum(bool(trial.cached_from) for trial in arm.trials)
        restarts = sum(max(trial.attempts - 1, 0) for trial in arm.trials)
        rows.append(
            Row.of(
                arm_label(arm),
                f"{sum(_hours(facts.study, trial) for trial in arm.trials):.2f}",
                f"{sum(speeds) / len(speeds):.1f}" if speeds else "-",
                str(restarts),
                str(taken),
            )
        )
    return Table(("arm", unit, "images/s", "restarts", "taken over"), tuple(rows), left=1)


def _hours(study: Study, trial: TrialView) -> float:
    """Of all attempts that have ended, from their start to their end."""
    resources = study.resources
    devices = resources.ranks * (resources.gpus_per_rank or resources.cpus_per_rank)
    ended = (a.ended_at - a.started_at for a in trial.attempt_list if a.ended_at and a.started_at)
    return devices * sum(ended) / 3600


def provenance(view: StudyView, facts: Facts) -> list[tuple[str, str]]:
    """(what, value) of all that one needs to get these numbers again; without what is not known."""
    trials = list(facts.trials.values())

    def tag(name: str, short: bool = False) -> str:
        return _all(one.tags.get(name, "")[: _SHORT if short else None] for one in trials)

    ended = [a.ended_at for trial in view.trials for a in trial.attempt_list if a.ended_at]
    last = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(max(ended))) if ended else ""
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(view.created_at))
    lines = [
        ("commit", tag("maskray.commit")),
        ("code package", tag("maskray.code", short=True)),
        ("training data", _all(_data(one.run.train, one.tags, "train") for one in trials)),
        ("validation data", _all(_data(one.run.val, one.tags, "val") for one in trials)),
        ("initial weights", tag("maskray.weights")),
        ("proposals", tag("maskray.proposals")),
        ("precision", facts.precision),
        ("device and versions", _all(one.result.platform for one in trials)),
        ("kernels", _all(one.result.kernels for one in trials)),
        ("submitted", f"{began} by {view.owner}" if view.created_at else ""),
        ("last trial ended", last),
        ("the same study again", _command(view, facts)),
        ("one trial again, compared", f"maskray reproduce {view.study}:KEY"),
    ]
    return [(what, value) for what, value in lines if value]


def _data(uri: str, tags: Mapping[str, str], split: str) -> str:
    digest = tags.get(f"maskray.manifest_{split}", "")
    return f"{uri} (manifest {digest[:_SHORT]})" if uri and digest else uri or digest


def _command(view: StudyView, facts: Facts) -> str:
    """With the commit where there was one; a tree with changes has its package alone."""
    known = next(iter(facts.trials.values()), None)
    commit = known.tags.get("maskray.commit", "") if known else ""
    data = f" --data {_folder(known.run)}" if known and _folder(known.run) else ""
    code = f" --code {commit[:_SHORT]}" if commit and not commit.endswith("-dirty") else ""
    return f"maskray run {view.name}.yaml{data}{code} --fresh"


def _folder(run: SeenRun) -> str:
    """The folder that --data names: of train and val, the only splits that it evaluates on."""
    (of_train, _, train), (of_val, _, val) = run.train.rpartition("/"), run.val.rpartition("/")
    return of_val if (of_train, train, val) == (of_val, "train", "val") else ""


def _all(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(value for value in values if value))
