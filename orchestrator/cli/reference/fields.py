"""The page of all fields of a run, made from its records and the comments beside them."""

from __future__ import annotations

import inspect
import io
import tokenize
from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from contract.recipe import RunConfig

_HEAD = """# All fields of a run

`maskray schema fields` makes this page from the records in `contract/`. A path with a dot is what
`--set`, `baseline.set` and the levels of a study name. Where a field is one of several records,
`kind` chooses it, and each has fields of its own. `maskray presets NAME` prints all values of a
preset, and which of them are its own.
"""


def fields_page() -> str:
    """The page as Markdown: a table for each record."""
    return "\n".join([_HEAD, *_sections(RunConfig, "")])


def _sections(record: type[BaseModel], path: str) -> Iterator[str]:
    yield from _table(record, path)
    for name, field in record.model_fields.items():
        for inner in _records(field.annotation):
            yield from _sections(inner, f"{path}.{name}" if path else name)


def _table(record: type[BaseModel], path: str) -> Iterator[str]:
    kind = record.model_fields.get("kind")
    title = f"`{path}`" if path else "The run"
    yield f"## {title}{f', kind `{kind.default}`' if kind is not None else ''}\n"
    if record.__doc__:
        yield inspect.cleandoc(record.__doc__) + "\n"
    comments = _comments(record)
    rows = [
        f"| `{name}` | {_default(field)} | {_bounds(field)} | {comments.get(name, '')} |"
        for name, field in record.model_fields.items()
        if name != "kind" and not _records(field.annotation)
    ]
    if rows:
        yield "\n".join(["| field | default | values | |", "|---|---|---|---|", *rows]) + "\n"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return f"`{_plain(field.default)}`"


def _plain(value: object) -> str:
    if isinstance(value, BaseModel):
        return type(value).__name__
    return _cell(repr(list(value) if isinstance(value, tuple) else value))


def _bounds(field: FieldInfo) -> str:
    """The type, the choices or the limits."""
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str | int)]
    if choices:
        return " ".join(f"`{choice}`" for choice in choices)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{sign} {value:g}"
        for mark in field.metadata
        for name, sign in signs.items()
        if isinstance(value := getattr(mark, name, None), int | float)
    ]
    name = getattr(field.annotation, "__name__", "") if isinstance(field.annotation, type) else ""
    return ", ".join([name, *limits] if name else limits)


def _records(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    # the records of a union, and not those in a list or a mapping, which no path leads to
    return [record for part in get_args(annotation) for record in _records(part)]


def _comments(record: type[BaseModel]) -> dict[str, str]:
    """What stands behind each field, or in the lines above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    current = ""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(record)).readline):
        match token.type:
            case tokenize.INDENT:
                depth += 1
            case tokenize.DEDENT:
                depth -= 1
            case tokenize.NAME if not current and token.string in record.model_fields:
                if depth == 1:
                    current = token.string
                    found[current] = " ".join(above)
                above = []
            case tokenize.COMMENT:
                text = _cell(token.string.removeprefix("#").strip())
                if current:
                    found[current] = f"{found[current]} {text}".strip()
                else:
                    above.append(text)
            case tokenize.NEWLINE:
                current, above = "", []
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
