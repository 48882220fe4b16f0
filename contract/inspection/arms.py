"""What a report asks of the arms' detections, and what the program that looks at them answers."""

from __future__ import annotations

from typing import Literal

from contract.data import DataConfig
from contract.record import Message, Record


class ArmDetections(Record):
    """Where one finished trial left its detections. pictures: of each arm one trial is drawn."""

    arm: str
    seed: int
    folder: str
    path: str  # in the folder
    pictures: bool = False


class ArmsPlan(Record):
    """`python -m pipelines.inspect.arms PLAN ANSWER` reads it. colours: by arm."""

    data: DataConfig
    kind: Literal["segm", "bbox"]
    trials: tuple[ArmDetections, ...]
    colours: dict[str, str]


class ArmPicture(Message):
    """One image or part of one. arm: empty for the truth. jpeg: in base64."""

    arm: str
    caption: str
    jpeg: str


class PictureRow(Message):
    """The same pixels for the truth and for all arms."""

    group: Literal["random", "disagreement"]
    caption: str
    pictures: tuple[ArmPicture, ...]


class ArmErrors(Message):
    """Of one trial: AP50, and what each kind of error costs of it; fractions."""

    arm: str
    seed: int
    ap50: float
    costs: dict[str, float]


class ArmsAnswer(Message):
    """min_score: from which on a detection is drawn, and counts as one for disagreement."""

    rows: tuple[PictureRow, ...] = ()
    errors: tuple[ArmErrors, ...] = ()
    min_score: float = 0.0
