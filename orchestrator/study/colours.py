"""The colour of each arm of a study, wherever it is shown."""

from __future__ import annotations

from collections.abc import Iterable

BASELINE_COLOUR = "#e0813a"
# All of them read on white and on black.
COLOURS = (
    *("#3b82c4", "#4aa564", "#c2577f", "#8f74c9", "#a98f3c", "#4aa5a5", "#b56a4c"),
    *("#5f6fd0", "#7d9a3a", "#b05fb8", "#6b8594", "#cc5b5b"),
)


def colours_of(arms: Iterable[tuple[str, bool]]) -> dict[str, str]:
    """Arm's name -> colour. arms: (name, whether it is the baseline) in the study's order."""
    names = dict(arms)
    others = [name for name, baseline in names.items() if not baseline]
    chosen = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return {name: chosen.get(name, BASELINE_COLOUR) for name in names}
