"""What of the sources a run reaches, and its hash.

From the program of a trial it follows every name to its definition. The whole of a definition
counts: a function, or a class with all its methods. So it reaches more than what will run, and
never less: where a name cannot be followed, a whole module counts, or all sources.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from contract.recipe import RunConfig
from orchestrator.study.code_package import SOURCES_OF_A_RUN, installed, source_hash
from orchestrator.study.meaning.modules import Place, Sources, module_name
from orchestrator.study.meaning.view import Records, View, Views, Words

PROGRAM = "workers.ray_entry"  # of every trial
# They read a run as a whole: the trial's own, and the one of its checkpoint, which must be equal.
_READ_THE_RUN = frozenset(
    {("contract.attempt", "RunSpec"), ("workers.training.state", "check_same_run")}
)


class Meaning:
    """The sources of runs.

    files: by path in the tree. Names of records are those of this process, so the sources must be
    the ones that it runs.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = {
            name: content
            for name, content in files.items()
            if name.partition("/")[0] in SOURCES_OF_A_RUN
        }
        self._sources = Sources(self._files)
        self._records = _records_of_runs()
        self._views = Views(self._sources, self._records)
        self._reached: dict[frozenset[Place], Reached] = {}

    def of(self, run: RunConfig) -> Reached:
        """What of the sources the numbers of `run` can depend on."""
        live = frozenset(_places(run))
        if live not in self._reached:
            self._reached[live] = self._reach(live)
        return self._reached[live]

    def _reach(self, held: frozenset[Place]) -> Reached:
        live, mentioned = held, Words(())
        while True:  # what is reached may make records, which reach more
            walk = _Walk(self._sources, self._records, self._views, held, live, mentioned)
            walk.whole(PROGRAM)
            walk.follow()
            if walk.makes <= live and walk.mentions == mentioned.all:
                return _reached(walk, self._files)
            live, mentioned = live | walk.makes, Words(walk.mentions)


@dataclass(frozen=True)
class Reached:
    """sha256: of all that is reached. mentions: words by which it may read a field of a record.

    None where it hands records on whole, so that any field may be read.
    """

    sha256: str
    mentions: Words | None
    places: frozenset[Place] = frozenset()


def _reached(walk: _Walk, files: Mapping[str, bytes]) -> Reached:
    digest = hashlib.sha256()
    for place, text in sorted(walk.texts.items()):
        digest.update("\0".join((*place, text, "")).encode())
    for name in sorted(files):
        if not name.endswith(".py") or walk.is_unreadable(name):
            content = hashlib.sha256(files[name]).hexdigest()
            digest.update(f"{name}\0{content}\n".encode())
    mentions = None if walk.hands_on else Words(walk.mentions)
    return Reached(
        digest.hexdigest(), mentions, frozenset((name, given) for name, given, _ in walk.texts)
    )


class _Walk:
    """One walk through the sources.

    held: the records in the run. live: these, and the ones that reached code makes. mentioned: the
    words of the last walk, by which methods of records are found.
    """

    def __init__(
        self,
        sources: Sources,
        records: Records,
        views: Views,
        held: frozenset[Place],
        live: frozenset[Place],
        mentioned: Words,
    ) -> None:
        self.texts: dict[tuple[str, str, str], str] = {}
        self.makes: set[Place] = set()
        self.mentions: set[str] = set()
        self.hands_on = False
        self._unreadable: set[str] = set()
        self._sources, self._records, self._views = sources, records, views
        self._alive = frozenset().union(*(records.bases.get(place, {place}) for place in live))
        self._mentioned = mentioned
        self._loaded: set[str] = set()
        self._done: set[Place] = set()
        self._next: list[Place] = []
        for place in sorted(held):
            self._follow_record(place)

    def follow(self) -> None:
        while self._next:
            place = self._next.pop()
            if place not in self._done:
                self._done.add(place)
                self._follow(*place)

    def whole(self, name: str) -> None:
        """Everything that the module defines."""
        self._load(name)
        module = self._sources.module(name)
        if module is not None:
            self._next += [(name, given) for given in module.definitions]

    def is_unreadable(self, path: str) -> bool:
        """Whether the file was reached, and is no Python."""
        return module_name(path) in self._unreadable

    # --- steps ------------------------------------------------------------------------------

    def _follow(self, name: str, given: str) -> None:
        self._load(name)
        module = self._sources.module(name)
        if module is None:
            return
        if given not in module.definitions:  # the module itself, or what it gets in some other way
            self.whole(name)
            return
        for number, statement in enumerate(module.definitions[given]):
            self._take((name, given, str(number)), self._views.of(module, statement, self._alive))

    def _follow_record(self, place: Place) -> None:
        """What a record of the run does, and those that it derives from."""
        for name, given in self._records.bases.get(place, ()):
            self._load(name)
            module = self._sources.module(name)
            for statement in module.definitions.get(given, ()) if module is not None else ():
                assert module is not None
                if isinstance(statement, ast.ClassDef):
                    view = self._views.of(module, statement, self._alive, self._mentioned)
                    self._take((name, given, "methods"), view)

    def _take(self, place: tuple[str, str, str], view: View) -> None:
        if view.text:
            self.texts[place] = view.text
        self.mentions |= view.mentions
        self.makes |= view.makes
        self.hands_on |= view.hands_on
        self._next += view.refers
        for dotted in view.loads:
            self._load_dotted(dotted)
        named = [text.strip(".") for text in view.words]
        for text in named:
            if "." in text and (text in self._sources or text in self._sources.packages):
                for module in self._sources.below(text):
                    self.whole(module)
        if view.names_anything and not any(
            text in self._sources or text in self._sources.packages for text in named
        ):
            for module in self._sources.below(""):
                self.whole(module)

    def _load(self, name: str) -> None:
        """What runs when somebody imports the module."""
        if name in self._loaded:
            return
        self._loaded.add(name)
        package, _, _ = name.rpartition(".")
        if package in self._sources:
            self._load(package)
        module = self._sources.module(name)
        if module is None:
            self._unreadable.add(name)
            return
        for number, statement in enumerate(module.effects):
            self._take((name, "", str(number)), self._views.of(module, statement, self._alive))
        for dotted in module.loads:
            self._load_dotted(dotted)
        for star in module.stars & {*self._sources.below("")}:
            self.whole(star)
        entered = set(module.acting)
        if self._sources.knows_subclasses:
            entered |= module.classes
        # a record's fields are values of a run, whose making does nothing
        self._next += [place for given in entered if not self._is_record(place := (name, given))]

    def _is_record(self, place: Place) -> bool:
        return place in self._records.bases

    def _load_dotted(self, dotted: str) -> None:
        parts = dotted.split(".")
        for n in range(1, len(parts) + 1):
            if (name := ".".join(parts[:n])) in self._sources:
                self._load(name)


# --- the records of a run -------------------------------------------------------------------


def _records_of_runs() -> Records:
    """Every record that a run can hold, found by the annotations."""
    found: set[type[BaseModel]] = set()

    def look(annotation: Any) -> None:
        is_record = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if is_record and annotation not in found:
            found.add(annotation)
            for one in annotation.model_fields.values():
                look(one.annotation)
        for part in get_args(annotation):
            look(part)

    look(RunConfig)
    own = {base for record in found for base in record.__mro__ if _is_ours(base)}
    bases = {
        _place(record): frozenset(_place(base) for base in record.__mro__ if base in own)
        for record in own
    }
    return Records(bases, _place(RunConfig), _READ_THE_RUN)


def _is_ours(base: type) -> bool:
    return base.__module__.partition(".")[0] in SOURCES_OF_A_RUN


def _place(record: type) -> Place:
    return record.__module__, record.__qualname__


def _places(value: Any) -> Iterator[Place]:
    """The records in a value, at any depth."""
    if isinstance(value, BaseModel):
        yield _place(type(value))
        for name in type(value).model_fields:
            yield from _places(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _places(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _places(item)


_known: dict[str, Meaning] = {}


def own_meaning() -> Meaning:
    """Of the sources that this process runs, as they lie on the disk now."""
    files = installed()
    key = source_hash(files)
    if key not in _known:
        _known.clear()  # a notebook may live through many edits
        _known[key] = Meaning(files)
    return _known[key]
