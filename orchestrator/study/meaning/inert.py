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


def is_inert(module: Module, statement: ast.AST, in_class: bool = False) -> bool:
    """in_class: a default of a record may be a record; making one elsewhere may do anything."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            values = [*statement.args.defaults, *statement.args.kw_defaults]
            return (
                _annotations_are_texts(module, statement)
                and _decorated(module, statement.decorator_list)
                and all(value is None or is_plain_value(module, value) for value in values)
            )
        case ast.ClassDef():
            return (
                not statement.keywords
                and _decorated(module, statement.decorator_list)
                and all(_is_known_base(module, base) for base in statement.bases)
                and _annotations_are_texts(module, statement)
                and all(is_inert(module, part, in_class=True) for part in statement.body)
            )
        case ast.Assign(targets=[ast.Name()], value=value):
            return is_plain_value(module, value, records=in_class)
        case ast.AnnAssign(target=ast.Name(), value=value):
            return _annotations_are_texts(module, statement) and (
                value is None or is_plain_value(module, value, records=in_class)
            )
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case _:
            return False


def has_plain_decorators(module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether no decorator reads its annotations, or enters it somewhere."""
    return _decorated(module, node.decorator_list)


def is_plain_value(module: Module, node: ast.expr, records: bool = False) -> bool:
    """Whether to compute it calls nothing but what makes a plain value. records: or a record."""

    def plain(*parts: ast.expr | None) -> bool:
        return all(part is None or is_plain_value(module, part, records) for part in parts)

    match node:
        case ast.Constant() | ast.Name() | ast.Lambda():
            return True  # a lambda runs later, and its text counts
        case ast.Attribute():
            return _is_of_another_module(module, node)
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            return plain(*parts)
        case ast.Dict(keys=keys, values=values):
            return None not in keys and plain(*keys, *values)
        case ast.Subscript(value=of, slice=inner):
            return _is_type(module, of) and plain(inner)
        case ast.UnaryOp(operand=ast.Constant()):
            return True
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):  # of types
            return all(_is_named(part) for part in (left, right)) and plain(left, right)
        case ast.BinOp(left=left, right=right):
            return all(isinstance(part, ast.Constant) for part in (left, right))
        case ast.Call(func=func, args=arguments, keywords=keywords):
            known = _full_name(module, func) in _CALLS or (records and _is_record(module, func))
            return known and plain(*arguments, *(keyword.value for keyword in keywords))
        case _:
            return False


def is_plain_test(module: Module, node: ast.expr) -> bool:
    """Whether a condition only reads names and compares."""
    match node:
        case ast.Constant() | ast.Name():
            return True
        case ast.Attribute(value=inner) | ast.UnaryOp(operand=inner):
            return is_plain_test(module, inner)
        case ast.Compare(left=left, comparators=others):
            return all(is_plain_test(module, part) for part in (left, *others))
        case _:
            return False


def _is_of_another_module(module: Module, node: ast.expr) -> bool:
    """Whether `a.b` asks an import for `b`, and not an object of this module's own."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and (
        len(module.imports.get(node.id, ())) == 1 and node.id not in module.definitions
    )


def _is_named(node: ast.expr) -> bool:
    match node:
        case ast.Name() | ast.Attribute() | ast.Subscript() | ast.Constant(value=None):
            return True
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _is_named(left) and _is_named(right)
        case _:
            return False


def _annotations_are_texts(module: Module, statement: ast.AST) -> bool:
    """Whether no annotation is computed when the module is imported."""
    if "__future__.annotations" in module.imports.get("annotations", ()):
        return True
    for inner in ast.walk(statement):
        match inner:
            case ast.AnnAssign() | ast.arg(annotation=ast.expr()):
                return False
            case ast.FunctionDef(returns=ast.expr()) | ast.AsyncFunctionDef(returns=ast.expr()):
                return False
    return True


def _is_type(module: Module, node: ast.expr) -> bool:
    """Whether `node[...]` is a type."""
    if isinstance(node, ast.Name) and node.id in _TYPES and not module.dotted([node.id]):
        return True
    return _full_name(module, node).startswith(("typing.", "collections.abc."))


def _decorated(module: Module, decorators: list[ast.expr]) -> bool:
    for one in decorators:
        called = one.func if isinstance(one, ast.Call) else one
        given = [*one.args, *(k.value for k in one.keywords)] if isinstance(one, ast.Call) else []
        name = called.id if isinstance(called, ast.Name) else ""
        builtin = name in _BUILTIN_DECORATORS and not module.dotted([name])
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
