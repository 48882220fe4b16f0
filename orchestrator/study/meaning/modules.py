"""The sources as modules: what each imports and defines, and where a name leads."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

Place = tuple[str, str]  # a module and a name in it; "" is the module itself
# A name -> the dotted names that it may stand for: an import in a `try` may have another one beside
# it.
Names = dict[str, set[str]]


@dataclass
class Module:
    """One source file. imports: all, also those of functions."""

    name: str
    is_package: bool
    tree: ast.Module
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: Names = field(default_factory=dict)
    loads: set[str] = field(default_factory=set)  # what the imports may load, as dotted names
    rebound: set[str] = field(default_factory=set)  # names that some function gives a value, too

    def __post_init__(self) -> None:
        for statement in self.tree.body:
            for name in _given(statement):
                self.definitions.setdefault(name, []).append(statement)
        for inner in ast.walk(self.tree):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                for _, bound, target in self.bindings(inner):
                    self.imports.setdefault(bound, set()).add(target)
                    self.loads.add(target)
        for statement in self.tree.body:
            own = set(_given(statement))
            self.rebound |= {name for name in bound_in(statement) if name not in own}

    def bindings(self, statement: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str, str]]:
        """Of each name that an import gives: how it is written, the name, what it stands for."""
        for alias in statement.names:
            if isinstance(statement, ast.Import):
                top = alias.name.partition(".")[0]
                bound, target = (alias.asname, alias.name) if alias.asname else (top, top)
                self.loads.add(alias.name)
                yield f"import {alias.name} as {bound}", bound, target
            else:
                base = self._base(statement)
                bound, target = alias.asname or alias.name, f"{base}.{alias.name}"
                self.loads.add(base)
                yield f"from {base} import {alias.name} as {bound}", bound, target

    def _base(self, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        parts = self.name.split(".")
        above = statement.level - (1 if self.is_package else 0)
        return ".".join(filter(None, [*parts[: len(parts) - above], statement.module or ""]))

    def dotted(self, path: list[str]) -> list[str]:
        """What the first name of a path may stand for, with the rest of the path.

        Empty for a local name or a built-in one.
        """
        roots = {*self.imports.get(path[0], ())}
        if path[0] in self.definitions:
            roots.add(f"{self.name}.{path[0]}")
        return sorted(".".join([root, *path[1:]]) for root in roots)


class Sources:
    """The Python files of a tree, each read when it is first asked for.

    files: by path in the tree, the bytes of all its sources.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        # sorted: where a module and a package have one name, Python takes the package
        python = sorted((path for path in files if path.endswith(".py")), key=_is_package)
        self.paths = {module_name(path): path for path in python}
        self._files = files
        self._modules: dict[str, Module | None] = {}
        self._places: dict[str, frozenset[tuple[Place, str]]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.paths

    @cached_property
    def packages(self) -> frozenset[str]:
        """Also folders without an `__init__.py`."""
        names = [name.split(".") for name in self.paths]
        return frozenset(".".join(parts[:n]) for parts in names for n in range(1, len(parts)))

    def content(self, name: str) -> bytes:
        return self._files[self.paths[name]]

    def below(self, package: str) -> list[str]:
        """The modules of a package, at any depth, and itself."""
        return [name for name in self.paths if f"{name}.".startswith(f"{package}.")]

    def module(self, name: str) -> Module | None:
        """None if the file is no Python that this interpreter reads."""
        if name not in self._modules:
            try:
                tree = ast.parse(self.content(name))
                self._modules[name] = Module(name, _is_package(self.paths[name]), tree)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                self._modules[name] = None
        return self._modules[name]

    def places(self, dotted: str) -> frozenset[Place]:
        """Where a dotted name may lead, through imports of other modules.

        Empty if it leads out of the sources. Attributes of what it leads to are left out.
        """
        return frozenset(place for place, _ in self._ways(dotted))

    def the_place(self, dotted: str) -> Place | None:
        """The one place that the whole of a dotted name leads to."""
        ways = self._ways(dotted)
        [(place, more)] = ways if len(ways) == 1 else [(("", ""), "?")]
        return place if not more else None

    def _ways(self, dotted: str) -> frozenset[tuple[Place, str]]:
        if dotted not in self._places:
            self._places[dotted] = frozenset(self._resolve(dotted))
        return self._places[dotted]

    def _resolve(self, dotted: str) -> Iterator[tuple[Place, str]]:
        """Places, and the attributes that are asked of each."""
        ways, gone = [dotted], set[str]()
        while ways:
            way = ways.pop()
            name, rest = self._split(way)
            if not name or way in gone:  # two modules may import from each other
                continue
            gone.add(way)
            first, _, more = rest.partition(".")
            module = self.module(name) if first else None
            imports = module.imports.get(first, ()) if module is not None else ()
            if module is None or first in module.definitions or not imports:
                yield (name, first), more
            ways += [".".join(filter(None, (target, more))) for target in imports]

    def _split(self, dotted: str) -> tuple[str, str]:
        """The longest module that `dotted` begins with, and what comes behind it."""
        parts = dotted.split(".")
        for n in range(len(parts), 0, -1):
            name = ".".join(parts[:n])
            if name in self.paths:
                return name, ".".join(parts[n:])
        return "", ""


def bound_in(node: ast.AST) -> Iterator[str]:
    """Every name that something in a node gives a value, in whatever scope."""
    for inner in ast.walk(node):
        match inner:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                yield name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name
            case ast.MatchMapping(rest=str(name)):
                yield name
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                yield from names
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                if inner is not node:
                    yield from ((one.asname or one.name).partition(".")[0] for one in aliases)


def _is_package(path: str) -> bool:
    return path.endswith("__init__.py")


def module_name(path: str) -> str:
    """The dotted name of a file in the tree."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _given(statement: ast.stmt) -> Iterator[str]:
    """The names that a top-level statement gives a value, but for imports."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    for inner in ast.walk(statement):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id
        elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield inner.name
