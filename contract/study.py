"""A study as a person writes it, and the submission that travels to the service."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

from contract.record import Record, parse_record

StudyState = Literal["active", "paused", "done", "failed", "cancelled"]

# held: of a seed that waits for a look. spared: of one that a look found needless.
TrialState = Literal[
    "held", "queued", "starting", "running", "stopping", "done", "failed", "cancelled", "spared"
]

LiveTrialState = Literal["starting", "running", "stopping"]
FinalState = Literal["done", "failed", "cancelled", "spared"]
FINAL_STATES: tuple[FinalState, ...] = get_args(FinalState)  # of trials and of studies
LIVE_TRIALS: tuple[LiveTrialState, ...] = get_args(LiveTrialState)  # an attempt is under way

_MOST_SEEDS = 1000

_LEAST, _MOST = 1e-4, 1e6  # of a resource: Ray's unit, and far more than a rank can use


class Baseline(Record):
    """Where the arms start: either a preset or a run file, with dotted overrides."""

    preset: str = ""
    file: str = ""
    set: dict[str, JsonValue] = {}


class Resources(Record):
    """What one trial of the study occupies: a gang of `ranks` that starts as a whole or waits."""

    ranks: int = Field(1, ge=1, le=100_000)
    cpus_per_rank: float = Field(1.0, ge=_LEAST, le=_MOST)
    gpus_per_rank: float = Field(0.0, ge=0, le=_MOST)
    custom_per_rank: dict[str, float] = {}  # custom Ray resources
    max_nodes: int = Field(0, ge=0)  # 0: the gang may spread over any number of nodes

    @field_validator("gpus_per_rank")
    @classmethod
    def _countable(cls, value: float) -> float:
        if 0 < value < _LEAST:
            raise ValueError(f"is {value:g}; Ray counts in steps of {_LEAST:g}")
        return value

    @field_validator("custom_per_rank")
    @classmethod
    def _custom(cls, value: dict[str, float]) -> dict[str, float]:
        for name, amount in value.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory") or not name:
                raise ValueError(
                    f"{name!r} is no custom resource; use cpus_per_rank or gpus_per_rank"
                )
            if not _LEAST <= amount <= _MOST:
                raise ValueError(f"{name} is {amount:g}; give {_LEAST:g} to {_MOST:g}")
        return value


def check_gpus(resources: Resources) -> None:
    """Raises ValueError if the ranks of a trial would share a GPU, which NCCL refuses.

    Asked of what is submitted. It is no part of the record: the service still reads studies that an
    older version accepted.
    """
    if resources.ranks > 1 and 0 < resources.gpus_per_rank < 1:
        raise ValueError(
            f"resources: {resources.ranks} ranks with gpus_per_rank {resources.gpus_per_rank:g} "
            "would share a GPU, and NCCL takes one rank a GPU; give gpus_per_rank: 1, or ranks: 1 "
            "(loop.max_images_per_forward then makes the same step in parts)"
        )


def _form(side: Any) -> str:
    return "<arm>" if isinstance(side, str) else "<difference>"


class Difference(Record):
    """One side minus the other. A side is an arm, or itself a difference.

    An arm is a name of `arms`, "factor=level,factor=level" (a factor that it leaves out: the mean
    over its levels), a level that one factor alone has, or "baseline".
    """

    of: Side
    minus: Side


# The tags never reach a person: `contract.record` leaves them out of a path.
Side: TypeAlias = Annotated[
    Annotated[str, Tag("<arm>")] | Annotated[Difference, Tag("<difference>")],
    Discriminator(_form),
]

Expected: TypeAlias = Literal["", "better", "worse", "equivalent"]
Variance: TypeAlias = Literal["pooled", "own"]
# same_arm: all arms are one run, with seeds of their own; a difference found there is false.
Control: TypeAlias = Literal["none", "same_arm"]


class Contrast(Difference):
    """What a study asks. `expected` is told beside the answer; it makes no test one-sided."""

    metric: str = ""  # empty: the study's primary one
    expected: Expected = ""
    margin: float = Field(0.0, ge=0, le=100)  # points of AP; 0 asks for no equivalence

    @model_validator(mode="after")
    def _equivalent_within(self) -> Contrast:
        if self.expected == "equivalent" and not self.margin:
            raise ValueError("expected: equivalent needs a margin in points, such as margin: 1.0")
        return self


def _seeds_form(seeds: Any) -> str:
    return "<looks>" if isinstance(seeds, dict | BaseModel) else "<list>"


class Looks(Record):
    """Seeds until it is settled: 0, 1, ... in steps, with a look at the contrasts after each."""

    start: int = Field(3, ge=3, le=100)  # a verdict takes three
    most: int = Field(10, ge=3, le=100)
    looks: tuple[int, ...] = (3, 5, 7, 10)  # numbers of seeds

    @model_validator(mode="after")
    def _in_order(self) -> Looks:
        looks = self.looks
        if len(looks) < 2 or any(low >= high for low, high in pairwise(looks)):
            raise ValueError(f"looks {list(looks)} must be at least two numbers that grow")
        if (looks[0], looks[-1]) != (self.start, self.most):
            raise ValueError(
                f"looks {list(looks)} must begin at start, {self.start}, and end at most, "
                f"{self.most}"
            )
        return self


# The tags never reach a person, as above.
Seeds: TypeAlias = Annotated[
    Annotated[tuple[int, ...], Field(min_length=1), Tag("<list>")]
    | Annotated[Looks, Tag("<looks>")],
    Discriminator(_seeds_form),
]


class Public(Record):
    """A public number of an arm's very recipe, in points of AP, and how far from it is too far."""

    value: float = Field(gt=0, le=100)
    band: float = Field(gt=0, le=100)  # half of it: value - band to value + band


class Range(Record):
    """Values from the first to the last number, whose ratios or differences are equal.

    Each is rounded to three significant digits, but for the two ends.
    """

    log: tuple[float, float] | None = None
    linear: tuple[float, float] | None = None
    num: int = Field(ge=2, le=1000)

    @model_validator(mode="after")
    def _has_ends(self) -> Range:
        if (self.log is None) == (self.linear is None):
            raise ValueError("give either log: [FIRST, LAST] or linear: [FIRST, LAST]")
        first, last = self._ends()
        if first == last:
            raise ValueError(f"both ends are {first:g}")
        if self.log is not None and min(first, last) <= 0:
            raise ValueError("the ends of log are above 0")
        return self

    def _ends(self) -> tuple[float, float]:
        ends = self.log if self.log is not None else self.linear
        assert ends is not None
        return ends

    def values(self) -> list[float]:
        """The numbers, whole ones as whole numbers."""
        first, last = self._ends()
        steps = [place / (self.num - 1) for place in range(1, self.num - 1)]
        if self.log is not None:
            inner = [first * (last / first) ** step for step in steps]
        else:
            inner = [first + (last - first) * step for step in steps]
        numbers = [first, *(float(f"{value:.3g}") for value in inner), last]
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{self.num} numbers from {first:g} to {last:g} are not distinct")
        return [int(number) if number == int(number) else number for number in numbers]


def _with_ranges(factors: Any) -> Any:
    """Factors whose only level is a path with a range get a level for each of its numbers."""
    if not isinstance(factors, dict):
        return factors
    return {factor: _levels(factor, levels) for factor, levels in factors.items()}


def _levels(factor: str, levels: Any) -> Any:
    match levels:
        case dict() if len(levels) == 1 and "." in (path := str(next(iter(levels)))):
            given = levels[path]
            if not (isinstance(given, dict) and given.keys() & {"log", "linear", "num"}):
                return levels
            numbers = parse_record(Range, given, f"{factor}.{path}").values()
            return {f"{number:g}": {path: number} for number in numbers}
        case _:
            return levels


class Study(Record):
    """A baseline, named factors with named levels, a design and seeds.

    A level is a set of dotted overrides.
    """

    name: str = Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = ""
    baseline: Baseline
    factors: dict[
        str, dict[str, dict[str, JsonValue]]
    ] = {}  # factor -> level -> dotted path -> value
    design: Literal["grid", "one_at_a_time"] = "grid"
    control: Control = "none"
    seeds: Seeds = (0,)
    resources: Resources = Resources()
    priority: int = Field(0, ge=-100, le=100)
    gpu_hours: float = Field(0.0, ge=0)  # budget of the study; 0 is no limit
    max_parallel: int = Field(0, ge=0)  # trials at once; 0 is no limit
    max_attempts: int = Field(3, ge=1)
    paper_table: str = ""  # key into paper_tables.json, shown beside one's own numbers
    paper_rows: dict[str, str] = {}  # "factor=level,..." -> row of that table
    metrics: tuple[str, ...] = Field(
        ("bbox/AP", "segm/AP", "segm/AP50", "segm/AP75")
    )  # columns of the report
    primary: str = (
        ""  # the metric of contrasts that name none; empty: the first of `metrics` that there is
    )
    arms: dict[str, str] = {}  # short names of arms, for contrasts
    # The family that verdicts are on, at 5% together; empty: each arm minus the baseline.
    contrasts: dict[str, Contrast] = {}
    # arm -> metric -> public number: a mean outside of its band discredits absolute AP
    calibration: dict[str, dict[str, Public]] = {}
    variance: Variance = "pooled"  # of seeds: one for all arms, or each arm its own
    learned_ap: float = Field(10.0, ge=0, le=100)  # points of `primary` below which no verdict is

    @field_validator("factors", mode="before")
    @classmethod
    def _ranges(cls, value: Any) -> Any:
        return _with_ranges(value)

    @field_validator("seeds", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 1 <= value <= _MOST_SEEDS:
                raise ValueError(
                    f"a number stands for so many seeds, from 0 on; give 1 to {_MOST_SEEDS:,}"
                )
            return tuple(range(value))
        if isinstance(value, list | tuple) and (
            not value or any(isinstance(seed, bool) for seed in value)
        ):
            raise ValueError("give at least one seed, each a whole number")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: Seeds) -> Seeds:
        if isinstance(value, Looks):
            return value
        if len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("seeds must be distinct and not negative")
        return value

    @property
    def every_seed(self) -> tuple[int, ...]:
        """All seeds that may run."""
        return tuple(range(self.seeds.most)) if isinstance(self.seeds, Looks) else self.seeds


TRAINING_TAG = "maskray.training"


class TrialPlan(Record):
    """One trial as the submitter's code expanded it. To the service `run` is data."""

    key: str = Field(
        min_length=1, max_length=300
    )  # "roi=align,masks=sigmoid/seed-0", unique in its study
    arm: dict[str, str]  # factor -> level
    seed: int
    baseline: bool  # the arm that the others are compared with
    identity: str = Field(pattern=r"^[0-9a-f]{64}$")
    run: dict[str, JsonValue]
    tags: dict[str, str] = {}

    @property
    def training(self) -> str:
        """The identity of the training alone, without what evaluation reads; empty if unknown.

        A tag carries it, because an older client refuses a field that it does not know.
        """
        text = self.tags.get(TRAINING_TAG, "")
        return text if re.fullmatch(r"[0-9a-f]{64}", text) else ""


class Submission(Record):
    """A study with its trials, checked and expanded by the code that will run them."""

    study: Study
    study_yaml: str = Field(max_length=1_000_000)
    trials: tuple[TrialPlan, ...] = Field(min_length=1)
    code: str = ""  # SHA-256 of the uploaded package; empty runs the service's own code
    storage: str = ""  # where trial folders go; empty is the service's own
    warnings: tuple[str, ...] = ()  # repeated in the report
    idempotency_key: str = Field("", max_length=200)
    fresh: bool = False  # run trials anew that have a finished result
