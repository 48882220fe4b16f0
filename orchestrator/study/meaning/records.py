"""The records that a run can hold, by the place of their class in the sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel

from contract.recipe import RunConfig
from orchestrator.study.code_package import SOURCES_OF_A_RUN
from orchestrator.study.meaning.modules import Place


@dataclass(frozen=True)
class Records:
    """Of each record: bases, the records that it derives from, and itself; parts, the records that
    its fields may hold; written, the fields that a run's JSON has.
    """

    bases: Mapping[Place, frozenset[Place]]
    parts: Mapping[Place, frozenset[Place]]
    written: Mapping[Place, frozenset[str]]
    modules: frozenset[str] = field(default_factory=frozenset)

    def alive(self, held: Iterable[Place], made: Iterable[Place]) -> frozenset[Place]:
        """What may exist: what the run holds, and what code may make, with all that it is made of.

        A class that some living one derives from lives, too.
        """
        lives, todo = set(held), list(made)
        while todo:
            place = todo.pop()
            if place not in lives or place in made:
                lives.add(place)
                todo += [part for part in self.parts.get(place, ()) if part not in lives]
        return frozenset(base for place in lives for base in self.bases.get(place, {place}))


def records_of_runs() -> Records:
    """Every record that a run can hold, found by the annotations."""
    parts: dict[type[BaseModel], set[type[BaseModel]]] = {}

    def look(annotation: Any, holder: type[BaseModel] | None) -> None:
        is_record = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if is_record:
            if holder is not None:
                parts[holder].add(annotation)
            if annotation not in parts:
                parts[annotation] = set()
                for one in annotation.model_fields.values():
                    look(one.annotation, annotation)
        for part in get_args(annotation):
            look(part, holder)

    look(RunConfig, None)
    own = {base for record in parts for base in record.__mro__ if _is_ours(base)}
    return Records(
        {_place(one): frozenset(_place(b) for b in one.__mro__ if b in own) for one in own},
        {_place(one): frozenset(map(_place, found)) for one, found in parts.items()},
        {
            _place(one): frozenset(n for n, f in one.model_fields.items() if not f.exclude)
            for one in parts
        },
        frozenset(one.__module__ for one in parts),
    )


def held_by(value: Any) -> Iterator[Place]:
    """The records in a value, at any depth."""
    if isinstance(value, BaseModel):
        yield _place(type(value))
        for name in type(value).model_fields:
            yield from held_by(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from held_by(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from held_by(item)


def _is_ours(base: type) -> bool:
    return base.__module__.partition(".")[0] in SOURCES_OF_A_RUN


def _place(record: type) -> Place:
    return record.__module__, record.__qualname__
