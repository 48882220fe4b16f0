"""The public face in Python: submit a study, wait for its end, read it as a table.

`import maskray` gives these names. The service is that of the current folder, or the one that
MASKRAY_SERVER and MASKRAY_TOKEN name.
"""

from __future__ import annotations

import html
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from contract.answers import StudyAction, StudyView, TrialView
from contract.attempt import BEST_WEIGHTS, LAST_WEIGHTS
from contract.record import parse_record
from contract.study import FINAL_STATES, Study, Submission
from orchestrator.client import Client
from orchestrator.local.connect import connected_client
from orchestrator.results.report import build_report
from orchestrator.settings import service_files
from orchestrator.study.code_package import CodePackage, package
from orchestrator.study.read import check_study, read_study
from orchestrator.travel import expand_with_its_code

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ("trial", "seed", "baseline", "state", "attempts", "step", "error")


def connect() -> Session:
    """The service of this folder, which starts if it does not run, or the one that is configured.

    Raises ValueError or RuntimeError of one line.
    """
    return Session(connected_client())


def prepare(
    study: Study, text: str, data: str, code: str, fresh: bool, key: str
) -> tuple[Submission, CodePackage]:
    """The submission as the code that travels expands it, and that code.

    text: the study as a person wrote it. key: one of its own if empty.
    """
    sources = package(Path.cwd(), code)
    expansion = expand_with_its_code(study, data=data, root=Path.cwd(), code=sources)
    submission = Submission(
        study=study,
        study_yaml=text,
        trials=expansion.trials,
        code=sources.sha256,
        warnings=expansion.warnings,
        # A request that is sent twice after a lost answer is still one study.
        idempotency_key=key or uuid.uuid4().hex,
        fresh=fresh,
    )
    return submission, sources


class Session:
    """A service. Its methods raise ValueError for what it refuses, RuntimeError if it is away."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def submit(
        self,
        study: str | Path | Mapping[str, Any] | Study,
        data: str = "",
        *,
        code: str = "",
        fresh: bool = False,
    ) -> StudyHandle:
        """Submits a study and returns at once.

        study: a file, or the same as a dictionary. data: a folder or URI with `train` and `val`.
        code: a commit; default the working tree. fresh: run trials anew that have a result.
        """
        if isinstance(study, str | Path):
            record, text = read_study(Path(study))
        else:
            fields = study.sparse() if isinstance(study, Study) else dict(study)
            text = yaml.safe_dump(fields, sort_keys=False)
            record = parse_record(Study, fields, "study")
            check_study(record)
        submission, sources = prepare(record, text, data, code, fresh, "")
        self.client.upload_code(sources.sha256, sources.data)
        return StudyHandle(self.client, self.client.submit(submission).study)

    def study(self, name: str = "last") -> StudyHandle:
        """A study by its id, the newest of a name, or the newest of all."""
        views = sorted(self.client.studies(trials=False), key=lambda view: view.created_at)
        matches = [v.study for v in views if name == "last" or name in (v.study, v.name)]
        if not matches:
            known = ", ".join(view.study for view in views) or "none"
            raise ValueError(f"study {name!r}: not known {self.client.where()}; there are {known}")
        return StudyHandle(self.client, matches[-1])

    def studies(self) -> list[StudyHandle]:
        """All studies, the oldest first."""
        views = sorted(self.client.studies(trials=False), key=lambda view: view.created_at)
        return [StudyHandle(self.client, view.study) for view in views]


class StudyHandle:
    """A study that was submitted. In a notebook it shows itself as a table."""

    def __init__(self, client: Client, study: str) -> None:
        self.client, self.id = client, study

    @property
    def view(self) -> StudyView:
        """All that the service says of it now."""
        return self.client.study(self.id)

    @property
    def state(self) -> str:
        """active, paused, done, failed or cancelled."""
        return self.view.state

    @property
    def trials(self) -> list[TrialHandle]:
        """Its trials in the order of the table."""
        return [TrialHandle(trial) for trial in self.view.trials]

    def trial(self, key: str) -> TrialHandle:
        """One trial by its key, such as "roi=align/seed-0"."""
        trials = {trial.key: trial for trial in self.trials}
        if key not in trials:
            raise ValueError(f"trial {key!r}: study {self.id} has {', '.join(trials)}")
        return trials[key]

    def wait(self, timeout_s: float = 0.0, poll_s: float = 2.0) -> StudyHandle:
        """Returns itself once the study is over; a pause is not its end. 0 waits without limit.

        A notebook shows the table meanwhile. Raises TimeoutError; the study then goes on.
        """
        show, deadline = _shower(), time.monotonic() + timeout_s
        while True:
            view = self.view
            show(_table(view))
            if view.state in FINAL_STATES:
                return self
            if timeout_s and time.monotonic() > deadline:
                raise TimeoutError(f"study {self.id} is {view.state} after {timeout_s:g} s")
            time.sleep(poll_s)

    def frame(self) -> pd.DataFrame:
        """One row a trial: its factors and its metrics as columns, AP as fractions."""
        import pandas as pd

        trials = self.view.trials
        return pd.DataFrame([_row(trial) for trial in trials])

    def report(self, folder: str | Path) -> Path:
        """Writes the report into `folder`; its page."""
        return build_report(self.view, Path(folder)).page

    def act(self, action: StudyAction) -> StudyHandle:
        """cancel, pause, resume or retry."""
        self.client.act_on_study(self.id, action)
        return self

    def __repr__(self) -> str:
        return f"<study {self.id}: {self.state}>"

    def _repr_html_(self) -> str:
        return _table(self.view)


class TrialHandle:
    """A trial as it was when its study was asked."""

    def __init__(self, view: TrialView) -> None:
        self.view = view
        self.key, self.arm, self.seed, self.state = view.key, view.arm, view.seed, view.state
        self.metrics = view.metrics

    def weights(self, which: Literal["last", "best"] = "last", folder: str | Path = ".") -> Path:
        """The file of its weights; a copy in `folder` if the trial lies behind a URI.

        Raises ValueError if there is none (yet).
        """
        name = LAST_WEIGHTS if which == "last" else BEST_WEIGHTS
        files = service_files(self.view.storage)
        if not files.exists(name):
            raise ValueError(f"trial {self.key}: is {self.state} and has no {which} weights")
        return files.fetch(name, Path(folder))

    def __repr__(self) -> str:
        return f"<trial {self.key}: {self.state}>"


def _row(trial: TrialView) -> dict[str, object]:
    step = trial.progress.step if trial.progress is not None else None
    values: dict[str, object] = {
        "trial": trial.key,
        **{_free(factor): level for factor, level in trial.arm.items()},
        "seed": trial.seed,
        "baseline": trial.baseline,
        "state": trial.state,
        "attempts": trial.attempts,
        "step": step,
        "error": trial.error,
    }
    return values | trial.metrics


def _free(factor: str) -> str:
    """As in table.csv: a factor may have the name of a column."""
    return f"factor.{factor}" if factor in _COLUMNS else factor


def _table(view: StudyView) -> str:
    """The study as a table of HTML: each trial with its state, step and main metrics."""
    shown = [name for name in ("bbox/AP", "segm/AP", "keypoints/AP") if _any_has(view, name)]
    head = ["trial", "state", "step", *shown]
    rows = []
    for trial in view.trials:
        progress = trial.progress
        step = f"{progress.step}/{progress.steps}" if progress is not None else ""
        values = [
            f"{100 * trial.metrics[name]:.1f}" if trial.metrics.get(name, -1) >= 0 else ""
            for name in shown
        ]
        state = f"{trial.state}: {trial.error}" if trial.error else trial.state
        rows.append([trial.key, state, step, *values])
    return (
        f"<p><b>{html.escape(view.name)}</b> ({html.escape(view.study)}): {view.state}</p><table>"
        f"<thead>{_html_row(head, 'th')}</thead>"
        f"<tbody>{''.join(_html_row(row, 'td') for row in rows)}</tbody></table>"
    )


def _any_has(view: StudyView, metric: str) -> bool:
    return any(metric in trial.metrics for trial in view.trials)


def _html_row(cells: list[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


class _Html:
    """What a notebook displays."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _repr_html_(self) -> str:
        return self.text


def _shower() -> Callable[[str], None]:
    """Shows a table in the place of the one before, in a notebook; elsewhere nothing."""
    ipython = sys.modules.get("IPython")  # a notebook has imported it; nobody else needs it
    if ipython is None or ipython.get_ipython() is None:
        return lambda _: None
    handle: Any = None

    def show(text: str) -> None:
        nonlocal handle
        if handle is None:
            handle = ipython.display.display(_Html(text), display_id=True)
        else:
            handle.update(_Html(text))

    return show
