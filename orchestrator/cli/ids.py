"""The service that commands talk to, and ids from what a person types: a name, `last`, a key."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.client import Client


def open_client() -> Client:
    """A client of the service, which starts if this folder's own does not run."""
    # Imported late: httpx and pydantic take longer than all of `maskray --help`.
    from orchestrator.local.connect import connected_client

    return connected_client()


def study_id(client: Client, name: str) -> str:
    """The id of the study that `name` means: an id, the newest study of that name, or `last`."""
    views = sorted(client.studies(trials=False), key=lambda view: view.created_at)
    if not views:
        raise ValueError(f"study {name!r}: there are no studies yet {client.where()}")
    if name == "last":
        return views[-1].study
    matches = [view.study for view in views if name in (view.study, view.name)]
    if not matches:
        hint = _nearest(name, [view.study for view in views])
        raise ValueError(f"study {name!r}: not known{hint}; maskray status lists them")
    return matches[-1]


def trial_id(client: Client, name: str) -> str:
    """The id of the trial that `name` means: an id, or STUDY:KEY with a study as above."""
    study, _, key = name.partition(":")
    if key:
        trials = client.study(study_id(client, study)).trials
        matches = [trial.trial for trial in trials if trial.key == key]
        known = [trial.key for trial in trials]
    else:
        known = _siblings(client, name)
        matches = [trial for trial in known if trial == name]
    if not matches and not key and name in _names_of_studies(client):
        raise ValueError(
            f"trial {name!r}: that is a study; name one of its trials: {name}:KEY "
            "(see maskray status)"
        )
    if not matches:
        raise ValueError(f"trial {name!r}: not known{_nearest(key or name, known)}")
    return matches[0]


def is_trial(client: Client, name: str) -> bool:
    """Whether `name` means a trial: a key behind a colon, or the id of one."""
    return ":" in name or name in _siblings(client, name)


def _names_of_studies(client: Client) -> set[str]:
    views = client.studies(trials=False)
    return {"last"} | {name for view in views for name in (view.study, view.name)}


def _siblings(client: Client, name: str) -> list[str]:
    """The trials of the study that `name` would belong to, or of all studies if there is none."""
    study = name.rpartition("-")[0]  # a trial's id is STUDY-NUMBER
    studies = {view.study for view in client.studies(trials=False)}
    if study in studies:
        return [trial.trial for trial in client.study(study).trials]
    if name in studies:
        return []
    # Only a mistyped id comes here: the list of all trials is long, and serves the hint alone.
    return [trial.trial for view in client.studies() for trial in view.trials]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
