"""From what a person types to an id: `last`, a study's name, a trial's key."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.client import Client


def study_id(client: Client, name: str) -> str:
    """The id of the study that `name` means: an id, the newest study of that name, or `last`."""
    views = sorted(client.studies(trials=False), key=lambda view: view.created_at)
    if not views:
        raise ValueError(f"study {name!r}: there are no studies yet")
    if name == "last":
        return views[-1].study
    named = [view.study for view in views if name in (view.study, view.name)]
    if not named:
        raise ValueError(
            f"study {name!r}: not known{_nearest(name, [view.study for view in views])}; maskray status lists them"
        )
    return named[-1]


def trial_id(client: Client, name: str) -> str:
    """The id of the trial that `name` means: an id, or STUDY:KEY with a study as above."""
    study, _, key = name.partition(":")
    if key:
        trials = client.study(study_id(client, study)).trials
        found = [trial.trial for trial in trials if trial.key == key]
        known = [trial.key for trial in trials]
    else:
        known = _trials_beside(client, name)
        found = [trial for trial in known if trial == name]
    if not found and not key and name in _names_of_studies(client):
        raise ValueError(
            f"trial {name!r}: that is a study; name one of its trials: {name}:KEY (see maskray status)"
        )
    if not found:
        raise ValueError(f"trial {name!r}: not known{_nearest(key or name, known)}")
    return found[0]


def is_trial(client: Client, name: str) -> bool:
    return ":" in name or name in _trials_beside(client, name)


def _names_of_studies(client: Client) -> set[str]:
    return {"last"} | {
        name for view in client.studies(trials=False) for name in (view.study, view.name)
    }


def _trials_beside(client: Client, name: str) -> list[str]:
    """The ids of the study that `name` would be a trial of: ids are STUDY-NUMBER. Of all studies if there is none."""
    study = name.rpartition("-")[0]
    studies = {view.study for view in client.studies(trials=False)}
    if study in studies:
        return [trial.trial for trial in client.study(study).trials]
    return (
        []
        if name in studies
        else [trial.trial for view in client.studies() for trial in view.trials]
    )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
