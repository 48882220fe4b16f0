"""Which statements do nothing, when a module is imported, but give a name its value."""

from __future__ import annotations

import ast

from orchestrator.study.meaning.modules import Module

# By full name: a function of one's own may be called `cache` too.
_DECORATORS = {
    "contextlib.contextmanager", "dataclasses.dataclass", "functools.cache", "functools.lru_cache",
    "pydantic.field_validator", "pydantic.model_validator", "torch.inference_mode",
    "torch.no_grad", "triton.jit", "typing.final", "typing.overload",
}  # fmt: skip
_BUILTIN_DECORATORS = {"classmethod", "property", "staticmethod"}
_CALLS = {"pydantic.Field", "pydantic.ConfigDict", "dataclasses.field", "typing.TypeVar"}
_TYPES = {"dict", "frozenset", "list", "set", "tuple", "type"}
_BASES = {"torch.nn.Module", "typing.NamedTuple", "typing.Protocol"}


def is_inert(module: Module, statement: ast.AST) -> bool:
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            values = [*statement.args.defaults, *statement.args.kw_defaults]
            return _decorated(module, statement.decorator_list) and all(
                value is None or is_plain_value(module, value) for value in values
            )
        case ast.ClassDef():
            return (
                not statement.keywords
                and _decorated(module, statement.decorator_list)
                and all(_is_known_base(module, base) for base in statement.bases)
                and all(is_inert(module, part) for part in statement.body)
            )
        case ast.Assign(targets=[ast.Name()], value=value):
            return is_plain_value(module, value)
        case ast.AnnAssign(target=ast.Name(), value=value):
            return value is None or is_plain_value(module, value)
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case _:
            return False


def is_plain_value(module: Module, node: ast.expr) -> bool:
    """Whether to compute it calls nothing but what makes a plain value."""
    match node:
        case ast.Constant() | ast.Name():
            return True
        case ast.Attribute(value=inner):
            return is_plain_value(module, inner)
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            return all(is_plain_value(module, part) for part in parts)
        case ast.Dict(keys=keys, values=values):
            both = [*values, *(key for key in keys if key is not None)]
            return None not in keys and all(is_plain_value(module, part) for part in both)
        case ast.Subscript(value=of, slice=inner):
            return _is_type(module, of) and is_plain_value(module, inner)
        case ast.UnaryOp(operand=operand):
            return is_plain_value(module, operand)
        case ast.BinOp(left=left, right=right):
            return is_plain_value(module, left) and is_plain_value(module, right)
        case ast.Compare(left=left, comparators=others):
            return all(is_plain_value(module, part) for part in (left, *others))
        case ast.Call(func=func, args=arguments, keywords=keywords):
            return (_full_name(module, func) in _CALLS or _is_record(module, func)) and all(
                is_plain_value(module, part)
                for part in (*arguments, *(keyword.value for keyword in keywords))
            )
        case ast.Lambda():
            return True  # it runs later, and its text counts
        case _:
            return False


def _is_type(module: Module, node: ast.expr) -> bool:
    """Whether `node[...]` is a type."""
    if isinstance(node, ast.Name) and node.id in _TYPES and not module.dotted([node.id]):
        return True
    return _full_name(module, node).startswith(("typing.", "collections.abc."))


def _decorated(module: Module, decorators: list[ast.expr]) -> bool:
    for one in decorators:
        called = one.func if isinstance(one, ast.Call) else one
        given = [*one.args, *(k.value for k in one.keywords)] if isinstance(one, ast.Call) else []
        builtin = isinstance(called, ast.Name) and called.id in _BUILTIN_DECORATORS
        if not (builtin or _full_name(module, called) in _DECORATORS):
            return False
        if not all(is_plain_value(module, value) for value in given):
            return False
    return True


def _is_known_base(module: Module, base: ast.expr) -> bool:
    return _full_name(module, base) in _BASES or _is_record(module, base)


def _is_record(module: Module, node: ast.expr) -> bool:
    """Whether it is a class of `contract/`, whose classes are records."""
    name = _full_name(module, node)
    return name.startswith("contract.") and name.rpartition(".")[2].lstrip("_")[:1].isupper()


def _full_name(module: Module, node: ast.expr) -> str:
    """The dotted name that `a.b` stands for; empty if it may stand for more than one."""
    names: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        names.append(inner.attr)
        inner = inner.value
    if not isinstance(inner, ast.Name):
        return ""
    dotted = module.dotted([inner.id, *reversed(names)])
    return dotted[0] if len(dotted) == 1 else ""
