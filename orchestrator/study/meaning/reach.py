"""The code that a run's numbers can depend on, as a hash.

It begins with every module that the program of a trial imports, at whatever place, and takes away
what no value of the run can reach (see `pieces`): branches of records that the run does not hold,
and then the functions, classes, imports and modules that nobody else names. Where a name might be
meant that is not written out, nothing is taken away: a trial then runs again that need not.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from contract.recipe import RunConfig
from orchestrator.study.code_package import SOURCES_OF_A_RUN, installed, source_hash
from orchestrator.study.meaning.doubts import (
    fingerprint,
    is_doubtful,
    named_by_text,
    read_known,
)
from orchestrator.study.meaning.inert import is_inert
from orchestrator.study.meaning.modules import Module, Place, Sources, module_name
from orchestrator.study.meaning.pieces import Piece, Pieces
from orchestrator.study.meaning.records import held_by, records_of_runs

PROGRAM = "workers.ray_entry"  # of every trial

# By these a class may hear of one that derives from it, and enter it somewhere.
_HOOKS = (b"init_subclass__", b"__subclasses__", b"metaclass")
# Importing them does nothing that changes a number.
_LIBRARIES = frozenset(sys.stdlib_module_names) | {"numpy", "pydantic", "torch", "torchvision"}


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
        self.sources = Sources(self._files)
        self._records, self._known = records_of_runs(), read_known()
        self._pieces = Pieces(self.sources, self._records, self._is_known)
        self.imported, self._by_text = _imported(self.sources, self._records.modules)
        # whether all code is named as it is, and all records are made by their names
        self._plain = self._has_no_doubts()
        self._loaded = self.imported if self._plain else frozenset(self.sources.paths)
        self._reached: dict[frozenset[Place], Reached] = {}

    def of(self, run: RunConfig) -> Reached:
        """What of the sources the numbers of `run` can depend on."""
        held = frozenset(held_by(run))
        if held not in self._reached:
            self._reached[held] = self._reach(held)
        return self._reached[held]

    def _is_known(self, module: Module, statement: ast.stmt) -> bool:
        return (module.name, fingerprint(statement)) in self._known

    def _has_no_doubts(self) -> bool:
        for name in self.imported:
            if any(word in self.sources.content(name) for word in _HOOKS):
                return False
            module = self.sources.module(name)
            for statement in module.tree.body if module is not None else ():
                assert module is not None
                doubtful = is_doubtful(self.sources, module, statement)
                if doubtful and not self._is_known(module, statement):
                    return False
        return True

    def _reach(self, held: frozenset[Place]) -> Reached:
        everything = frozenset(self._records.bases)
        plain, made = self._plain, frozenset[Place]() if self._plain else everything
        while True:  # what may run may make records, by which more may run
            alive = self._records.alive(held, made)
            rooms = [
                _Room(module, self._pieces, alive, made)
                for name in sorted(self._loaded)
                if (module := self.sources.module(name)) is not None
            ]
            if plain and any(item.piece.values for room in rooms for item in room.items):
                # a module is handed on as a value: any name in it may be meant
                plain, made = False, everything
                continue
            if plain:
                _Sweep(rooms, self.sources, alive, self._by_text).sweep()
            left = [item for room in rooms for item in room.items if not item.gone]
            makes = made.union(*(item.piece.makes for item in left))
            if makes == made:
                return self._hashed(rooms)
            made = makes

    def _hashed(self, rooms: Iterable[_Room]) -> Reached:
        digest, places = hashlib.sha256(), set[Place]()
        for room in rooms:
            for item in room.items:
                if not item.gone and item.piece.text:
                    digest.update(f"{room.module.name}\0{item.piece.text}\0".encode())
                    places |= {(room.module.name, name) for name in item.gives}
        for name in sorted(self._files):
            own = module_name(name)
            unread = own in self._loaded and self.sources.module(own) is None
            if not name.endswith(".py") or unread:
                content = hashlib.sha256(self._files[name]).hexdigest()
                digest.update(f"{name}\0{content}\n".encode())
        return Reached(digest.hexdigest(), frozenset(places))


@dataclass(frozen=True)
class Reached:
    """sha256: of all that counts. places: the definitions that do."""

    sha256: str
    places: frozenset[Place] = frozenset()


# --- what a trial imports -------------------------------------------------------------------


def _imported(sources: Sources, records: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    """All modules that a trial may import, and of these the ones that a text names.

    records: the modules of a run's records.
    """
    loaded, texts, todo = set[str](), set[str](), [PROGRAM, *records]
    while todo:
        name = todo.pop()
        if name in loaded or name not in sources:
            continue
        loaded.add(name)
        module = sources.module(name)
        if module is None:
            continue
        named = [one for part in module.tree.body for one in named_by_text(sources, module, part)]
        texts.update(named)
        for dotted in (name, *module.loads, *named):
            todo += _prefixes(dotted)
    return frozenset(loaded), frozenset(texts)


# --- what nobody names -----------------------------------------------------------------------


@dataclass
class _Item:
    """A top-level statement, or one name of an import.

    gives: the names that it defines. target: of an import, what its name stands for. statement: the
    import. inert: whether it does nothing but define.
    """

    piece: Piece
    gives: tuple[str, ...] = ()
    target: str = ""
    statement: ast.stmt | None = None
    inert: bool = False
    gone: bool = False


class _Room:
    """One module with what is left of it."""

    def __init__(
        self, module: Module, pieces: Pieces, alive: frozenset[Place], made: frozenset[Place]
    ) -> None:
        self.module = module
        self.items: list[_Item] = []
        given: dict[ast.stmt, list[str]] = {}
        for name, statements in module.definitions.items():
            for statement in statements:
                given.setdefault(statement, []).append(name)
        for statement in module.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for text, bound, target in module.bindings(statement):
                    names = {target.rpartition(".")[2]} - {bound}  # only here, under another name
                    self.items.append(_Item(Piece(text, names), (bound,), target, statement))
            else:
                piece = pieces.of(module, statement, alive, made)
                inert = is_inert(module, statement)
                self.items.append(_Item(piece, tuple(given.get(statement, ())), inert=inert))


class _Sweep:
    """Takes away what nobody names who is left."""

    def __init__(
        self,
        rooms: list[_Room],
        sources: Sources,
        alive: frozenset[Place],
        by_text: frozenset[str],
    ) -> None:
        self._rooms, self._sources, self._alive = rooms, sources, alive
        self._named: Counter[str] = Counter()  # by how many items
        self._definers: dict[str, list[tuple[_Room, _Item]]] = {}
        self._values = set(by_text)  # modules of which any name may be meant
        for room in rooms:
            if room.module.name in by_text:  # what it imports may be asked of it
                self._named.update(
                    name for item in room.items if item.target for name in item.gives
                )
            for item in room.items:
                if item.piece.text:
                    self._named.update(item.piece.names)
                    self._values |= item.piece.values
                if not item.target:
                    for name in item.gives:
                        self._definers.setdefault(name, []).append((room, item))

    def sweep(self) -> None:
        while self._definitions() or self._imports() or self._modules():
            pass

    def _definitions(self) -> bool:
        """Whether one went: a definition whose name nobody else says."""
        went = False
        for name in sorted(self._definers):
            found = [(room, item) for room, item in self._definers[name] if not item.gone]
            if not found or not all(self._may_go(room, item) for room, item in found):
                continue
            if self._named[name] > sum(name in item.piece.names for _, item in found):
                continue
            for _, item in found:
                self._remove(item)
            went = True
        return went

    def _may_go(self, room: _Room, item: _Item) -> bool:
        handed_on = any(f"{room.module.name}.".startswith(f"{value}.") for value in self._values)
        private = item.gives[0].startswith("__")  # Python itself asks for `__getattr__`
        lives = (room.module.name, item.gives[0]) in self._alive
        kept = handed_on or private or lives or room.module.name == PROGRAM
        return item.inert and not kept and len(item.gives) == 1

    def _imports(self) -> bool:
        """Whether one went: the import of a name whose definition went, and which nobody uses."""
        went = False
        for room in self._rooms:
            used: set[str] | None = None
            for item in room.items:
                if not item.target or item.gone or not self._is_gone(item.target):
                    continue
                if self._is_first_to_load(room, item):
                    continue
                if used is None:
                    used = set().union(*(i.piece.names for i in room.items if not i.gone))
                if item.gives[0] not in used:
                    self._remove(item)
                    went = True
        return went

    def _is_first_to_load(self, room: _Room, item: _Item) -> bool:
        """Whether the module of the name does something, when nothing beside it imports it."""
        module = item.target.rpartition(".")[0]
        beside = any(
            other is not item and not other.gone and other.target.rpartition(".")[0] == module
            for other in room.items
            if other.statement is item.statement
        )
        acts = any(
            other.piece.text and not other.inert and not other.target
            for one in self._rooms
            if one.module.name == module
            for other in one.items
        )
        return acts and not beside

    def _is_gone(self, target: str) -> bool:
        """Whether all that a dotted name leads to went."""
        places = self._sources.places(target)
        items = [
            item
            for place in places
            for room, item in self._definers.get(place[1], ())
            if room.module.name == place[0]
        ]
        return bool(items) and all(item.gone or not item.piece.text for item in items)

    def _modules(self) -> bool:
        """Whether one went: a module of which imports alone are left, and that no other imports."""
        imported = {
            module
            for room in self._rooms
            for item in room.items
            if item.target and not item.gone
            for module in _prefixes(item.target)
        }
        inner = set().union(
            *(
                item.piece.names  # an import in a function names its parts
                for room in self._rooms
                for item in room.items
                if not item.target and not item.gone
            )
        )
        for room in self._rooms:
            left = [item for item in room.items if not item.gone and item.piece.text]
            name = room.module.name
            if not left or name in imported or name.rpartition(".")[2] in inner:
                continue
            if name == PROGRAM or room.module.is_package:
                continue
            if all(item.target and self._does_nothing(item.target, imported) for item in left):
                for item in left:
                    self._remove(item)
                return True
        return False

    def _does_nothing(self, target: str, imported: set[str]) -> bool:
        """Whether importing it would load nothing that is not loaded without it."""
        own = [name for name in _prefixes(target) if name in self._sources]
        if own:
            return all(name in imported or name in self._sources.packages for name in own)
        return target.partition(".")[0] in _LIBRARIES

    def _remove(self, item: _Item) -> None:
        item.gone = True
        self._named.subtract(item.piece.names if item.piece.text else ())


def _prefixes(dotted: str) -> Iterator[str]:
    parts = dotted.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))


# --- our own --------------------------------------------------------------------------------

_known: dict[str, Meaning] = {}


def own_meaning() -> Meaning:
    """Of the sources that this process runs, as they lie on the disk now."""
    files = installed()
    key = source_hash(files)
    if key not in _known:
        _known.clear()  # a notebook may live through many edits
        _known[key] = Meaning(files)
    return _known[key]
