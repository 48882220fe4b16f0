"""The arms' detections side by side, and what kinds of errors they make.

Another room reads images and masks, so its program is spawned. Its answer is kept beside the
study's report: it does not change once all trials have ended.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from contract.answers import StudyView, TrialView
from contract.attempt import SPEC_FILE
from contract.data import DataConfig
from contract.files import uri_join
from contract.inspection.arms import ArmDetections, ArmsAnswer, ArmsPlan
from contract.words import one_line
from orchestrator.results.cells import Row, Table, arm_label, points
from orchestrator.results.comparison import Comparison
from orchestrator.results.facts import Facts
from orchestrator.study.contrasts import arm_name
from orchestrator.trial_folder import ANSWER_BYTES, REPORT_BYTES, TrialFileError, TrialFolder

LOG = logging.getLogger("maskray")

_MOST_BYTES = 2 << 30  # of one trial's detections; COCO's masks of 5,000 images are a tenth
_PATIENCE_S = 1800.0  # a validation set of 5,000 images and many trials take minutes


@dataclass(frozen=True)
class Arms:
    """answer: None where there is none yet; `why` then says so, unless nothing is missing."""

    answer: ArmsAnswer | None
    why: str = ""


def look_at_arms(
    view: StudyView, facts: Facts, comparison: Comparison, colours: Mapping[str, str]
) -> Arms:
    """Once all trials have ended; from the file that an earlier report left, if it fits."""
    plan = None if comparison.early else _plan(facts, comparison, colours)
    if plan is None:
        return Arms(None)
    text = plan.model_dump_json()
    name = f"report/arms-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    # The study's trials can write there too.
    kept = TrialFolder(uri_join(view.storage, view.study)) if view.storage else None
    try:
        if kept is not None and (raw := kept.read(name, REPORT_BYTES)) is not None:
            return Arms(ArmsAnswer.model_validate_json(raw))
        with tempfile.TemporaryDirectory() as folder:
            raw = _run(text, Path(folder))
        answer = ArmsAnswer.model_validate_json(raw)
        if kept is not None:
            kept.write(name, raw)
    except (OSError, RuntimeError, ValueError) as error:
        return Arms(None, f"no pictures and no kinds of errors: {one_line(error)}")
    return Arms(answer)


def _plan(facts: Facts, comparison: Comparison, colours: Mapping[str, str]) -> ArmsPlan | None:
    """None where no trial left detections, or where their data is not known."""
    trials: list[ArmDetections] = []
    kinds = [facts.primary.partition("/")[0].partition("-")[0], "segm", "bbox"]
    done = [(arm, t) for arm in comparison.arms for t in arm.trials if t.state == "done"]
    left = {t.trial: facts.trials[t.trial].result.artifacts for _, t in done}
    kind = next(
        (
            k
            for k in kinds
            if k in ("segm", "bbox") and any(f"detections/{k}" in x for x in left.values())
        ),
        None,
    )
    if kind is None:
        return None
    drawn = set[str]()
    for arm, trial in done:
        path = left[trial.trial].get(f"detections/{kind}", "")
        if not path or not _is_sound(trial, path):
            continue
        name = arm_name(arm.arm)
        first, one = name not in drawn, trial.storage
        drawn.add(name)
        trials.append(
            ArmDetections(arm=name, seed=trial.seed, folder=one, path=path, pictures=first)
        )
    data = _data(done[0][1], facts)
    if data is None or not trials:
        return None
    return ArmsPlan(
        data=data,
        kind="bbox" if kind == "bbox" else "segm",
        trials=tuple(trials),
        colours=dict(colours),
    )


def _is_sound(trial: TrialView, path: str) -> bool:
    """Whether a trial's path is a regular file below its folder, and not too large to look at."""
    try:
        size = TrialFolder(trial.storage).size(path)
    except TrialFileError as error:
        LOG.warning("%s; not drawn", error)
        return False
    return size is not None and size <= _MOST_BYTES


def _data(trial: TrialView, facts: Facts) -> DataConfig | None:
    """The validation data as the trial read it; None where another version wrote it."""
    attempt = facts.trials[trial.trial].result.attempt or 1
    try:
        spec = TrialFolder(trial.storage).json(SPEC_FILE.format(attempt=attempt), ANSWER_BYTES)
        run = spec.get("run") if isinstance(spec, dict) else None
        return DataConfig.model_validate(run.get("data") if isinstance(run, dict) else None)
    except (TrialFileError, ValidationError) as error:
        LOG.warning("%s: its data is not known (%s)", trial.key, one_line(error))
        return None


def _run(plan: str, folder: Path) -> bytes:
    """Raises RuntimeError with the program's own line if it fails."""
    asked, answered = folder / "plan.json", folder / "answer.json"
    asked.write_text(plan, encoding="utf-8")
    command = [sys.executable, "-m", "pipelines.inspect.arms", str(asked), str(answered)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {_PATIENCE_S:.0f} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return answered.read_bytes()


def errors_table(comparison: Comparison, answer: ArmsAnswer) -> Table | None:
    """A row for each arm: AP50, and what each kind of error costs of it; means over seeds."""
    if not answer.errors:
        return None
    kinds = list(answer.errors[0].costs)
    rows = []
    for arm in comparison.arms:
        own = [one for one in answer.errors if one.arm == arm_name(arm.arm)]
        if own:
            ap50 = points(sum(one.ap50 for one in own) / len(own))
            costs = (points(sum(one.costs[kind] for one in own) / len(own)) for kind in kinds)
            row = Row.of(arm_label(arm), ap50, *costs)
            rows.append(Row(row.cells, arm.baseline))
    return Table(("arm", "AP50", *kinds), tuple(rows), left=1)
