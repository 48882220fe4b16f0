"""The run that the arms of a study start from, and the run that each arm makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from contract.files import uri_join
from contract.model import FileWeights, FixedProposals
from contract.presets import run_preset
from contract.recipe import RunConfig, apply_overrides, parse_run
from contract.run_file import read_run_file
from contract.study import Study

UNSET = "unset"  # stands for a dataset that nobody has named yet

Nested = Mapping[str, Any]  # JSON data of a run, or of a part of it
Overrides = Mapping[str, Any]  # dotted path -> value, as a person wrote them


@dataclass(frozen=True)
class BaselineRun:
    """A study's baseline, parsed once. Its `data.train` and `data.val` may still be UNSET.

    root: the folder where relative places of data, weights and proposals start.
    """

    run: RunConfig
    root: Path

    @classmethod
    def of(cls, study: Study, root: Path, data: str = "") -> BaselineRun:
        """The study's preset or run file with its overrides.

        data: a folder or URI whose `train` and `val` replace the baseline's. Raises ValueError (one
        line) for what a person wrote wrong, FileNotFoundError if there is no such run file.
        """
        if study.baseline.preset:
            try:
                start = _parsed(run_preset(study.baseline.preset), "baseline")
            except ValueError as error:
                raise ValueError(f"baseline.preset: {error}") from None
        else:
            path = root / study.baseline.file
            start = _parsed(read_run_file(path), str(path))
        overrides = check_paths(study.baseline.set, "baseline.set")
        # Parsed before the overrides: `optimiser.lr: 0.01` needs to know which optimiser it means.
        run = _parsed(apply_overrides(_dumped(start), overrides), "baseline.set")
        if data:
            run = _with_data(run, uri_join(data, "train"), uri_join(data, "val"))
        return cls(_with_absolute_places(run, root), root)

    def arm(self, overrides: Overrides, where: str) -> RunConfig:
        """The baseline's run with the overrides of one arm; its places are absolute.

        The seed is the baseline's: a study's seeds come afterwards. Raises ValueError of one line;
        `where` names the arm or the level in it.
        """
        run = _parsed(apply_overrides(self._data, check_paths(overrides, where)), where)
        return _with_absolute_places(run, self.root)

    @cached_property
    def _data(self) -> Nested:
        return _dumped(self.run)  # kept: a study may have thousands of arms


def check_paths(overrides: Overrides, where: str) -> Overrides:
    """`overrides`, if each path could be one. Raises ValueError."""
    for path in overrides:
        if not path or any(not part for part in path.split(".")):
            raise ValueError(f"{where}: {path!r} is not a dotted path like 'model.roi.kind'")
        if path == "seed":
            # Trials of one arm differ in the seed alone; an arm that sets it would undo that.
            raise ValueError(f"{where}: seed: a study's seeds stand in its 'seeds'")
    return overrides


def absolute(uri: str, root: Path) -> str:
    """A local path as seen from `root`; a URI with a scheme stays as it is."""
    return uri if "://" in uri or uri == UNSET else str((root / Path(uri).expanduser()).resolve())


def _parsed(run: Nested, where: str) -> RunConfig:
    """`run` as a record; datasets that it does not name are UNSET."""
    data = run.get("data", {})
    # What is no mapping goes to the parser as it is, which says so in the person's words.
    if isinstance(data, Mapping):
        run = {**run, "data": {"train": UNSET, "val": UNSET, **data}}
    return parse_run(run, where)


def _dumped(run: RunConfig) -> Nested:
    return run.model_dump(mode="json")


def _with_data(run: RunConfig, train: str, val: str) -> RunConfig:
    return run.model_copy(update={"data": run.data.model_copy(update={"train": train, "val": val})})


def _with_absolute_places(run: RunConfig, root: Path) -> RunConfig:
    """`run` as a rank on another machine, in another working directory, can read it."""
    model, weights, proposals = run.model, run.model.weights, run.model.proposals
    if isinstance(weights, FileWeights):
        path = absolute(weights.path, root)
        model = model.model_copy(update={"weights": weights.model_copy(update={"path": path})})
    if isinstance(proposals, FixedProposals):
        uri = absolute(proposals.uri, root)
        model = model.model_copy(update={"proposals": proposals.model_copy(update={"uri": uri})})
    train, val = absolute(run.data.train, root), absolute(run.data.val, root)
    return _with_data(run.model_copy(update={"model": model}), train, val)
