"""What the service itself knows that a trial's numbers depend on.

A trial's identity is what its client computed. Whoever lies in it fools nobody but themselves, as
long as results stay with their owner. Another owner's result counts only under an equal proof.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache

from pydantic import JsonValue

from contract.data import MANIFEST_NAME
from contract.files import Files
from contract.study import Submission, TrialPlan
from orchestrator.study.code_package import installed_source_hash
from orchestrator.study.identity import canonical

PROOF_TAG = "maskray.proof"  # a trial without it has a result for its owner alone
_MAX_MANIFEST = 64 << 20


def with_proofs(submission: Submission) -> Submission:
    """The submission with a proof on each trial that the service can give one.

    The code package counts by its hash, which the service checked when it took it in.
    """

    @cache  # the trials of a study share a few datasets
    def manifest(uri: str) -> str:
        return manifest_hash(uri)

    code = submission.code or installed_source_hash()
    trials = []
    for trial in submission.trials:
        # never as it came: a client would write whatever it liked
        tags = {name: value for name, value in trial.tags.items() if name != PROOF_TAG}
        data = trial.run.get("data")
        named = [data.get(split) for split in ("train", "val")] if isinstance(data, dict) else []
        hashes = [manifest(uri) if isinstance(uri, str) else "" for uri in named]
        if hashes and all(hashes) and not _begins_from_a_file(trial.run):
            tags[PROOF_TAG] = _proof(trial, code, submission.study.resources.ranks, hashes)
        trials.append(trial.model_copy(update={"tags": tags}))
    return submission.model_copy(update={"trials": tuple(trials)})


def _begins_from_a_file(run: Mapping[str, JsonValue]) -> bool:
    """Whether weights or proposals are a file's, whose bytes the service does not know."""
    model = run.get("model")
    parts = [model.get("weights"), model.get("proposals")] if isinstance(model, dict) else []
    return any(isinstance(part, dict) and {"path", "uri"} & part.keys() for part in parts)


def manifest_hash(uri: str) -> str:
    """The SHA-256 of a dataset's manifest as the service reads it; empty where it cannot."""
    data = manifest_bytes(uri)
    return hashlib.sha256(data).hexdigest() if data is not None else ""


def manifest_bytes(uri: str) -> bytes | None:
    """The manifest of a packed dataset; None where this machine cannot read one."""
    files = Files(uri, tries=1)
    try:
        # a pipe would never end, and a device neither
        if files.local is not None and not (files.local / MANIFEST_NAME).is_file():
            return None
        size = files.size(MANIFEST_NAME)
        if size is None or size > _MAX_MANIFEST:
            return None
        return files.read(MANIFEST_NAME)
    except (OSError, ValueError):
        return None  # it is another machine's: then the result stays with its owner


def _proof(trial: TrialPlan, code: str, ranks: int, manifests: list[str]) -> str:
    data = trial.run["data"]
    assert isinstance(data, Mapping)
    # the manifest's hash stands for the place of its dataset
    rest = {name: value for name, value in data.items() if name not in ("train", "val")}
    everything = {
        "run": {**trial.run, "data": rest},
        "manifests": manifests,
        "code": code,
        "ranks": ranks,
        "identity": trial.identity,
    }
    return hashlib.sha256(canonical(everything).encode()).hexdigest()
