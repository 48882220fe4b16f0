"""The sources as modules: what each defines, imports, and does when it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

Place = tuple[str, str]  # a module and a name in it; "" is the module itself
# A name -> the dotted names that it may stand for: an import in a `try` may have another one beside
# it.
Names = dict[str, set[str]]

# A definition that one of these decorates is what it was; another decorator may enter it somewhere.
_DECORATORS = {
    "dataclass", "contextmanager", "asynccontextmanager", "cache", "lru_cache", "wraps", "jit",
    "no_grad", "inference_mode", "overload", "final", "override", "runtime_checkable",
    "total_ordering", "collector_paused",
}  # fmt: skip
# Calls that make a value and enter nothing anywhere.
_CONSTRUCTORS = {
    "ConfigDict", "Field", "Lock", "NewType", "ParamSpec", "Path", "TypeAdapter", "TypeVar",
    "compile", "dict", "field", "float", "frozenset", "fromkeys", "get_args", "getLogger", "int",
    "join", "keys", "len", "list", "local", "log", "max", "min", "partial", "range", "set",
    "sorted", "sqrt", "str", "sum", "tuple",
}  # fmt: skip


@dataclass
class Module:
    """One source file.

    definitions: by name, every top-level statement that gives it a value. effects: the other
    top-level statements, which run whenever somebody imports the module.
    """

    name: str
    is_package: bool
    tree: ast.Module
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: Names = field(default_factory=dict)
    effects: list[ast.stmt] = field(default_factory=list)
    loads: set[str] = field(default_factory=set)  # modules that it imports, as dotted names
    stars: set[str] = field(default_factory=set)  # modules of which it takes all names

    @cached_property
    def acting(self) -> frozenset[str]:
        """Names whose definition may do something when the module is imported."""
        return frozenset(
            name
            for name, statements in self.definitions.items()
            if (name.startswith("__") and name.endswith("__")) or any(map(_acts, statements))
        )

    @cached_property
    def classes(self) -> frozenset[str]:
        return frozenset(
            name
            for name, statements in self.definitions.items()
            if any(isinstance(statement, ast.ClassDef) for statement in statements)
        )

    @cached_property
    def importing(self) -> frozenset[ast.stmt]:
        """Definitions with an import of their own."""
        return frozenset(
            statement
            for statement in self.tree.body
            if any(isinstance(inner, ast.Import | ast.ImportFrom) for inner in ast.walk(statement))
        )

    def imports_of(self, statement: ast.stmt, names: Names, loads: set[str]) -> None:
        """Adds the names that imports in a statement give, and what they may load."""
        for inner in ast.walk(statement):
            if isinstance(inner, ast.Import):
                for alias in inner.names:
                    top = alias.name.partition(".")[0]
                    given = (alias.asname, alias.name) if alias.asname else (top, top)
                    names.setdefault(given[0], set()).add(given[1])
                    loads.add(alias.name)
            elif isinstance(inner, ast.ImportFrom):
                base = self._base(inner)
                loads.add(base)
                for alias in inner.names:
                    # a module in a package, or a name that it defines
                    names.setdefault(alias.asname or alias.name, set()).add(f"{base}.{alias.name}")
                    loads.add(f"{base}.{alias.name}")
                    if alias.name == "*":
                        self.stars.add(base)

    def _base(self, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        parts = self.name.split(".")
        above = statement.level - (1 if self.is_package else 0)
        return ".".join([*parts[: len(parts) - above], *(statement.module or "").split(".")]).strip(
            "."
        )


class Sources:
    """The Python files of a tree, each read when it is first asked for.

    files: by path in the tree, the bytes of all its sources.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._paths = {module_name(path): path for path in files if path.endswith(".py")}
        self._files = files
        self._modules: dict[str, Module | None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    @cached_property
    def packages(self) -> frozenset[str]:
        """Also folders without an `__init__.py`."""
        names = [name.split(".") for name in self._paths]
        return frozenset(".".join(parts[:n]) for parts in names for n in range(1, len(parts)))

    def below(self, package: str) -> list[str]:
        """The modules of a package, at any depth; of "" all modules."""
        return [name for name in self._paths if not package or f"{name}.".startswith(f"{package}.")]

    @cached_property
    def knows_subclasses(self) -> bool:
        """Whether some class may learn of the classes that derive from it."""
        return any(
            word in content
            for content in self._files.values()
            for word in (b"__init_subclass__", b"__subclasses__")
        )

    def module(self, name: str) -> Module | None:
        """None if the file is no Python that this interpreter reads."""
        if name not in self._modules:
            path = self._paths[name]
            try:
                tree = ast.parse(self._files[path])
            except (SyntaxError, ValueError):
                self._modules[name] = None
            else:
                self._modules[name] = _sorted_out(name, path.endswith("__init__.py"), tree)
        return self._modules[name]

    def resolve(self, dotted: str) -> frozenset[Place]:
        """The places that a dotted name may lead to, through imports of other modules.

        Empty if it leads out of the sources.
        """
        found: set[Place] = set()
        ways, gone = [dotted], set[str]()
        while ways:
            way = ways.pop()
            name, rest = self._split(way)
            if not name or way in gone:  # two modules may import from each other
                continue
            gone.add(way)
            first, _, more = rest.partition(".")
            module = self.module(name) if first else None
            if module is None:
                found.add((name, first))
                continue
            imports = module.imports.get(first, ())
            if first in module.definitions or not imports:
                found.add((name, first))
            ways += [".".join(filter(None, (target, more))) for target in imports]
        return frozenset(found)

    def _split(self, dotted: str) -> tuple[str, str]:
        """The longest module that `dotted` begins with, and what comes behind it."""
        parts = dotted.split(".")
        for n in range(len(parts), 0, -1):
            name = ".".join(parts[:n])
            if name in self._paths:
                return name, ".".join(parts[n:])
        return "", ""


def module_name(path: str) -> str:
    """The dotted name of a file in the tree."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _sorted_out(name: str, is_package: bool, tree: ast.Module) -> Module:
    module = Module(name, is_package, tree)
    for statement in tree.body:
        _sort(module, statement)
    return module


def _sort(module: Module, statement: ast.stmt) -> None:
    match statement:
        case ast.Expr(value=ast.Constant()):
            return  # a docstring
        case ast.Import() | ast.ImportFrom():
            module.imports_of(statement, module.imports, module.loads)
        case ast.If(test=test) if _is_type_checking(test):
            module.imports_of(statement, module.imports, set())
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            module.definitions.setdefault(statement.name, []).append(statement)
        case ast.Assign() | ast.AnnAssign() if names := list(_plain_targets(statement)):
            for name in names:
                module.definitions.setdefault(name, []).append(statement)
        case _:
            module.effects.append(statement)
            module.imports_of(statement, module.imports, module.loads)
            for inner in ast.walk(statement):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    module.definitions.setdefault(inner.id, []).append(statement)
                elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    module.definitions.setdefault(inner.name, []).append(statement)


def _plain_targets(statement: ast.Assign | ast.AnnAssign) -> Iterator[str]:
    """The names that an assignment gives; none if it also writes into something else."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    flat = [
        inner
        for target in targets
        for inner in (target.elts if isinstance(target, ast.Tuple) else [target])
    ]
    if all(isinstance(target, ast.Name) for target in flat):
        yield from (target.id for target in flat if isinstance(target, ast.Name))


def _acts(statement: ast.stmt) -> bool:
    """Whether it may do more, when it runs, than give a name its value."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return not {_called(one) for one in statement.decorator_list} <= _DECORATORS
        case ast.ClassDef():
            if statement.keywords:  # a metaclass
                return True
            parts = [part for part in statement.body if not isinstance(part, ast.FunctionDef)]
            decorated = not {_called(one) for one in statement.decorator_list} <= _DECORATORS
            return decorated or any(map(_acts, parts))
        case _:
            calls = [inner for inner in ast.walk(statement) if isinstance(inner, ast.Call)]
            return not {_called(call) for call in calls} <= _CONSTRUCTORS


def _called(node: ast.expr) -> str:
    """The last name of a decorator, or of what a call calls."""
    while isinstance(node, ast.Call):
        node = node.func
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return "?"


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
