"""`python -m orchestrator.study.meaning.relist`: writes `known.json` anew, after a look."""

from __future__ import annotations

import json

from orchestrator.study.meaning.doubts import KNOWN, doubtful, fingerprint
from orchestrator.study.meaning.reach import own_meaning

# They read a run as a whole: the trial's own, and the one of its checkpoint, which must be equal.
_READ_THE_RUN = (
    ("contract.attempt", "RunSpec"),
    ("workers.training.state", "check_same_run"),
)


def main() -> None:
    meaning = own_meaning()
    found = doubtful(meaning.sources, iter(sorted(meaning.imported)))
    for name, given in _READ_THE_RUN:
        module = meaning.sources.module(name)
        assert module is not None
        hashes = {*found.get(name, []), *map(fingerprint, module.definitions[given])}
        found[name] = sorted(hashes)
    KNOWN.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", "utf-8")
    print(f"{sum(map(len, found.values()))} statements in {len(found)} modules: {KNOWN.name}")


if __name__ == "__main__":
    main()
