"""Statements that may name code, or make a record, in a way that no name shows.

The ones in `known.json` were looked at: they make no record but the trial's own, and name no code
but what `named_by_text` finds. It holds their hashes; `python -m orchestrator.study.meaning.relist`
writes it anew. Any other one makes all code count.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from orchestrator.study.meaning.modules import Module, Sources

KNOWN = Path(__file__).with_name("known.json")

# By these, code is named by a text, or all names of a module are meant.
_BY_TEXT = {
    "exec_module", "find_class", "get_objects", "get_referrers", "get_type_hints", "getmembers",
    "getmodule", "import_module", "load_module", "locate", "module_from_spec", "reload",
    "resolve_name", "run_module", "run_path", "spec_from_file_location", "walk_packages",
    "__globals__", "f_globals", "currentframe", "_getframe", "__annotations__", "__file__",
    "__dict__", "addsitedir",
}  # fmt: skip
# By these, a record is made, or its class is found, without its name.
_BY_CLASS = {
    "__class__", "model_construct", "model_fields", "model_validate", "model_validate_json",
    "model_validate_strings", "validate_call", "TypeAdapter", "get_args", "__new__",
}  # fmt: skip
_WORDS = _BY_TEXT | _BY_CLASS
_BUILT_IN = {"eval", "exec", "globals", "__import__", "locals"}
_MODULES = {"builtins", "cloudpickle", "dill", "imp", "marshal", "pickle", "pkgutil", "runpy"}
_OF_SYS = {"sys.modules", "sys.path"}
_PART_OF_A_CLASS = {"__name__", "__qualname__", "__module__"}
_CODE = re.compile(r"(^|[;\n])\s*(from|import)\s+\w")
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:[./:][A-Za-z_]\w*)+\.?|[A-Za-z_]\w*\.$")


def fingerprint(statement: ast.stmt) -> str:
    """A hash of what a statement says, without comments and docstrings."""
    return hashlib.sha256(_spelt(statement).encode()).hexdigest()[:16]


def read_known() -> frozenset[tuple[str, str]]:
    """Module and hash of every statement that was looked at."""
    listed: dict[str, list[str]] = json.loads(KNOWN.read_text("utf-8"))
    return frozenset((module, one) for module, hashes in listed.items() for one in hashes)


def is_doubtful(sources: Sources, module: Module, statement: ast.stmt) -> bool:
    harmless = set[ast.AST]()
    for inner in ast.walk(statement):
        match inner:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="type")) as call, attr=attribute):
                harmless |= {call} if attribute in _PART_OF_A_CLASS else set()
            case ast.Compare(left=left, comparators=others):  # `type(a) is B`
                harmless |= {left, *others}
    return any(
        _is_doubtful(sources, module, inner)
        for inner in ast.walk(statement)
        if inner not in harmless
    )


def _is_doubtful(sources: Sources, module: Module, node: ast.AST) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom():
            return any(
                target in _OF_SYS
                or target.rpartition(".")[2] in _WORDS | {"*"}
                or target.partition(".")[0] in _MODULES
                or (target == "sys" and bound != "sys")
                for _, bound, target in module.bindings(node)
            )
        case ast.Name(id=name):
            return name in _WORDS or (name in _BUILT_IN and not module.dotted([name]))
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            return attribute in _WORDS or f"{name}.{attribute}" in _OF_SYS
        case ast.Attribute(attr=attribute):
            return attribute in _WORDS
        case ast.Call(func=ast.Name(id="vars" | "dir"), args=[]):
            return True
        case ast.Call(func=ast.Name(id="type" | "RunSpec") | ast.Attribute(attr="RunSpec")):
            return True
        case ast.JoinedStr(values=parts):
            texts = [part.value for part in parts if isinstance(part, ast.Constant)]
            return bool(texts) and str(texts[-1]).endswith(".py")
        case ast.Constant(value=str(text)):
            return bool(_CODE.search(text)) or (text.endswith(".py") and not _paths(sources, text))
        case _:
            return False


def named_by_text(sources: Sources, module: Module, statement: ast.stmt) -> list[str]:
    """The modules that a statement names in a text: as a file, and as code that it runs."""
    docs = {inner.value for inner in ast.walk(statement) if isinstance(inner, ast.Expr)}
    texts = [
        inner.value if isinstance(inner.value, str) else inner.value.decode("latin-1")
        for inner in ast.walk(statement)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str | bytes)
        if inner not in docs
    ]
    found = [name for text in texts if text.endswith(".py") for name in _paths(sources, text)]
    if not (is_doubtful(sources, module, statement) or {"-m", "-c"} & {*texts}):
        return found
    for match in (match for text in texts for match in _DOTTED.findall(text)):
        dotted = re.sub("[/:]", ".", match)
        parts = dotted.strip(".").split(".")
        names = [".".join(parts[:n]) for n in range(2, len(parts) + 1)]
        found += [name for name in names if name in sources]
        if dotted.endswith(".") and (package := dotted[:-1]) in sources.packages:
            found += sources.below(package)  # the start of a name that is put together
    return found


def _paths(sources: Sources, text: str) -> list[str]:
    """The modules whose file a path may end at."""
    end = f"/{text.lstrip('./')}"
    return [name for name, path in sources.paths.items() if f"/{path}".endswith(end)]


def _spelt(node: object) -> str:
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return ""
        case ast.AST():
            fields = ((name, getattr(node, name, None)) for name in sorted(node._fields))
            parts = (
                f"{name}={_spelt(value)}"
                for name, value in fields
                if name not in ("ctx", "type_comment", "kind") and value not in (None, [])
            )
            return f"{type(node).__name__}({','.join(parts)})"
        case list():
            return f"[{','.join(filter(None, map(_spelt, node)))}]"
        case _:
            return f"{type(node).__name__}:{node!r}"


def doubtful(sources: Sources, modules: Iterator[str]) -> dict[str, list[str]]:
    """By module the hashes of its doubtful statements."""
    found: dict[str, list[str]] = {}
    for name in modules:
        module = sources.module(name)
        for statement in module.tree.body if module is not None else ():
            assert module is not None
            if is_doubtful(sources, module, statement):
                found.setdefault(name, []).append(fingerprint(statement))
    return {name: sorted(set(hashes)) for name, hashes in sorted(found.items())}
