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
from dataclasses import dataclass, field

from contract.recipe import RunConfig
from orchestrator.study.code_package import SOURCES_OF_A_RUN, installed, source_hash
from orchestrator.study.meaning.inert import is_inert
from orchestrator.study.meaning.modules import Module, Place, Sources, module_name
from orchestrator.study.meaning.pieces import Piece, Pieces
from orchestrator.study.meaning.records import held_by, records_of_runs

PROGRAM = "workers.ray_entry"  # of every trial

# By these a class may hear of one that derives from it, and enter it somewhere.
_HOOKS = (b"init_subclass__", b"__subclasses__", b"metaclass")
# By these code may be named by a text, or all names of a module be meant.
_BY_TEXT = {
    "exec_module", "get_objects", "get_referrers", "get_type_hints", "getmembers", "import_module",
    "load_module", "module_from_spec", "reload", "resolve_name", "run_module", "run_path",
    "spec_from_file_location", "walk_packages",
}  # fmt: skip
_BUILT_IN = {"eval", "exec", "globals", "__import__", "locals"}
_OF_SYS = {"sys.modules", "sys.path"}
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
        self._sources = Sources(self._files)
        self._records = records_of_runs()
        self._pieces = Pieces(self._sources, self._records)
        self._loaded = _loaded(self._sources, self._records.modules)
        self._reached: dict[frozenset[Place], Reached] = {}

    def of(self, run: RunConfig) -> Reached:
        """What of the sources the numbers of `run` can depend on."""
        held = frozenset(held_by(run))
        if held not in self._reached:
            self._reached[held] = self._reach(held)
        return self._reached[held]

    def _reach(self, held: frozenset[Place]) -> Reached:
        everything = frozenset(self._records.bases)
        made = frozenset[Place]() if self._loaded.plain else everything
        while True:  # what may run may make records, by which more may run
            alive = self._records.alive(held, made)
            rooms = [
                _Room(module, self._pieces, alive, made)
                for name in sorted(self._loaded.modules)
                if (module := self._sources.module(name)) is not None
            ]
            if self._loaded.plain:
                _Sweep(rooms, self._sources, alive, self._loaded.by_text).sweep()
            left = [item for room in rooms for item in room.items if not item.gone]
            makes = made.union(*(item.piece.makes for item in left))
            # a module of records that is handed on as a value: any of them may be made
            if any(item.piece.values & self._records.modules for item in left):
                makes = everything
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
            unread = own in self._loaded.modules and self._sources.module(own) is None
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


@dataclass(frozen=True)
class _Loaded:
    """modules: all that a trial may import. by_text: of these, the ones that a text names.

    plain: whether all other code is named as it is. Where it is not, all modules may be imported.
    """

    modules: frozenset[str]
    by_text: frozenset[str]
    plain: bool


def _loaded(sources: Sources, records: Iterable[str]) -> _Loaded:
    """records: the modules of a run's records."""
    loaded, texts, todo = set[str](), set[str](), [PROGRAM, *records]
    while todo:
        name = todo.pop()
        if name in loaded or name not in sources:
            continue
        loaded.add(name)
        module = sources.module(name)
        if module is None:
            continue
        for statement in module.tree.body:
            by_text = _by_text(sources, module, statement)
            if by_text is None:
                return _Loaded(frozenset(sources.paths), frozenset(), plain=False)
            texts.update(by_text)
            todo += by_text
        for dotted in (name, *module.loads):
            todo += _prefixes(dotted)
    hooked = any(word in sources.content(name) for name in loaded for word in _HOOKS)
    return _Loaded(frozenset(loaded), frozenset(texts), plain=not hooked)


def _by_text(sources: Sources, module: Module, statement: ast.stmt) -> list[str] | None:
    """The modules that a statement names in a text; None if any code may be meant."""
    found: list[str] = []
    known = set[ast.AST]()
    for inner in ast.walk(statement):
        match inner:
            case ast.Call(func=ast.Name(id="import_module") as func, args=[argument]):
                package = _package(argument)
                if package in sources or package in sources.packages:
                    found += sources.below(package)
                    known.add(func)
            case ast.Constant(value=str(text)):
                if text.endswith(".py"):  # a path: any file that may lie there
                    end = f"/{text.lstrip('./')}"
                    found += [n for n, path in sources.paths.items() if f"/{path}".endswith(end)]
                words = text.replace(":", ".").removesuffix(".py").replace("/", ".").split(".")
                for n in range(2, len(words) + 1):
                    if (name := ".".join(words[:n])) in sources:
                        found.append(name)
            case ast.ImportFrom(names=[ast.alias(name="*")]):
                return None
    if any(_means_any_code(module, inner) for inner in ast.walk(statement) if inner not in known):
        return None
    return found


def _means_any_code(module: Module, node: ast.AST) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom():
            targets = {target for _, _, target in module.bindings(node)}
            # each use of `import_module` by its own name is looked at
            targets -= {"importlib.import_module"}
            return any(
                target in _OF_SYS or target.rpartition(".")[2] in _BY_TEXT for target in targets
            )
        case ast.Name(id=name):
            own = module.imports.get(name, set())
            built_in = name in _BUILT_IN and name not in module.definitions and not own
            return built_in or "importlib.import_module" in own
        case ast.Call(func=ast.Name(id="vars" | "dir"), args=[]):
            return True
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            return f"{name}.{attribute}" in _OF_SYS or attribute in _BY_TEXT
        case ast.Attribute(attr=attribute):
            return attribute in _BY_TEXT
        case _:
            return False


def _package(argument: ast.expr) -> str:
    """The package that `import_module` surely gets a module of; empty if that is not known."""
    match argument:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]) if text.endswith("."):
            return text[:-1]
        case _:
            return ""


# --- what nobody names -----------------------------------------------------------------------


@dataclass
class _Item:
    """A top-level statement, or one name of an import.

    gives: the names that it defines. target: of an import, what its name stands for. inert:
    whether it does nothing but define.
    """

    piece: Piece
    gives: tuple[str, ...] = ()
    target: str = ""
    inert: bool = False
    gone: bool = False


@dataclass
class _Room:
    """One module with what is left of it."""

    module: Module
    items: list[_Item] = field(default_factory=list)

    def __init__(
        self, module: Module, pieces: Pieces, alive: frozenset[Place], made: frozenset[Place]
    ) -> None:
        self.module, self.items = module, []
        given: dict[ast.stmt, list[str]] = {}
        for name, statements in module.definitions.items():
            for statement in statements:
                given.setdefault(statement, []).append(name)
        for statement in module.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for text, bound, target in module.bindings(statement):
                    names = {target.rpartition(".")[2]} - {bound}  # only here, under another name
                    self.items.append(_Item(Piece(text, names), (bound,), target))
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
            found = [(room, item) for room, item in self._definers.get(name, ()) if not item.gone]
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
                if used is None:
                    used = set().union(*(i.piece.names for i in room.items if not i.gone))
                if item.gives[0] not in used:
                    self._remove(item)
                    went = True
        return went

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
