"""The arms of a choice, read from its union.

A new arm joins every test that is parametrised by these.
"""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import pytest

from contract.record import Record


def arms(union: Any) -> list[Any]:
    """One parameter for each record of a union, and one for each other value of its fields.

    Fields with listed values count (`Literal`, `bool`); numbers keep their default. The names are
    `kind` and `kind-field=value`.
    """
    return [
        pytest.param(record, id=name)
        for kind in get_args(get_args(union)[0])
        for name, record in _variants(kind).items()
    ]


def records(union: Any) -> list[Any]:
    """As `arms`, the records alone."""
    return [parameter.values[0] for parameter in arms(union)]


def _variants(kind: type[Record]) -> dict[str, Record]:
    default = kind()
    variants = {str(default.kind): default}
    for field, info in kind.model_fields.items():
        for value in _values(info.annotation):
            if field != "kind" and value != info.default:
                variants[f"{default.kind}-{field}={value}"] = kind(**{field: value})
    return variants


def _values(annotation: Any) -> tuple[Any, ...]:
    if annotation is bool:
        return (False, True)
    return get_args(annotation) if get_origin(annotation) is Literal else ()
