"""The order of the test files: those that take minutes first, so that none of them is left over."""

from __future__ import annotations

from pathlib import Path

import pytest

LONGEST = (
    "tests/orchestrator/test_older_code.py",
    "tests/test_end_to_end.py",
    "tests/orchestrator/test_service_on_ray.py",
    "tests/nullgpu/test_budgets.py",
    "tests/workers/test_ray_entry.py",
    "tests/workers/test_train.py",
    "tests/workers/tracking/test_tracking.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` shares files out in this order (--no-loadscope-reorder), to two processes."""
    missing = [name for name in LONGEST if not (Path(__file__).parents[1] / name).is_file()]
    assert not missing, f"tests/conftest.py names files that are gone: {missing}"
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))
