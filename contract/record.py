"""Frozen records, and the one line that a person reads when a value does not fit one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class _Sparse(BaseModel):
    """A value that can be written without the fields at their default."""

    def sparse(self) -> dict[str, Any]:
        """JSON data of the fields that differ from their default, and of `kind`.

        The service and a code package may be of different versions. A version that adds a field
        with a default then still writes what an older one reads, and reads what an older one wrote.
        `kind` stays, because it names the record of a union.
        """
        data: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            at_default = not field.is_required() and value == field.get_default(
                call_default_factory=True
            )
            if name == "kind" or not at_default:
                data[name] = _sparse(value)
        return data


def _sparse(value: Any) -> Any:
    match value:
        case _Sparse():
            return value.sparse()
        case Mapping():
            return {key: _sparse(item) for key, item in value.items()}
        case list() | tuple():
            return [_sparse(item) for item in value]
        case _:
            return value


class Record(_Sparse):
    """An immutable value with validated fields. It takes no unknown field, no nan and no inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_not_yes_or_no(cls, data: Any) -> Any:
        # pydantic takes `true` for 1; a person who writes `lr: on` has slipped
        for name, value in data.items() if isinstance(data, dict) else ():
            if (
                isinstance(value, bool)
                and name in cls.model_fields
                and cls.model_fields[name].annotation in (int, float)
            ):
                raise ValueError(f"{name} is a number, not {value}")
        return data


class Message(_Sparse):
    """What another version may have written.

    Unknown fields are ignored, missing ones take their default.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")


AnyRecord = TypeVar("AnyRecord", bound=BaseModel)


def parse_record(record: type[AnyRecord], data: Any, where: str) -> AnyRecord:
    """Validates nested data as `record`.

    Raises ValueError of one line: `where`, the path, the value, the nearest valid name.
    """
    try:
        return record.model_validate(data)
    except ValidationError as error:
        # a field that does not exist first: where `basline` stands, `baseline` is missing, too
        errors = sorted(
            error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden"
        )
        problems = [_explain(record, data, problem) for problem in errors]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{where}: {problems[0]}{more}") from None


def _explain(record: type[BaseModel], data: Any, problem: Any) -> str:
    parts = _without_union_tags(data, problem["loc"])
    path = ".".join(str(part) for part in parts) or "the record"
    if problem["type"] == "extra_forbidden":
        names = field_names(record, parts[:-1], data)
        near = difflib.get_close_matches(str(parts[-1]), names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        return f"{path}: no such field; {hint}"
    if problem["type"] == "missing":
        return f"{path}: is required"
    if problem["type"] == "union_tag_invalid":
        kinds = [tag.strip("' ") for tag in problem["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(str(problem["ctx"]["tag"]), kinds, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(kinds)}"
        return f"{path}.kind: no kind {problem['ctx']['tag']!r}; {hint}"
    if problem["type"] == "union_tag_not_found":
        return f"{path}.kind: is required, it says which fields there are"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = "" if isinstance(value, Mapping | BaseModel) else f", got {value!r}"
    return f"{path}: {message}{shown}"


def _without_union_tags(data: Any, location: Sequence[Any]) -> list[Any]:
    """The location as people write it.

    Pydantic puts the tag that it chose behind the name of a union's field.
    """
    parts: list[Any] = []
    node, at_union = data, False
    for step in location:
        if at_union and isinstance(node, Mapping) and node.get("kind") == step:
            at_union = False
            continue
        if isinstance(step, str) and step.startswith("<"):  # the tag of a union without `kind`
            continue
        parts.append(step)
        if isinstance(node, Mapping):
            node = node.get(step)
        elif isinstance(node, list | tuple) and isinstance(step, int) and step < len(node):
            node = node[step]
        at_union = isinstance(node, Mapping) and "kind" in node
    return parts


def field_names(record: type[BaseModel], parts: Sequence[Any], data: Any) -> list[str]:
    """The fields of the record that `parts` lead to in `data`.

    Of a union they are those of the `kind` in `data`.
    """
    current: list[type[BaseModel]] = [record]
    node = data
    for part in parts:
        node = node.get(part) if isinstance(node, Mapping) else None
        found = [r.model_fields[part].annotation for r in current if part in r.model_fields]
        if not found:
            continue  # the key of a mapping: what it leads to is known already
        current = [r for annotation in found for r in _records(annotation)]
        kind = node.get("kind") if isinstance(node, Mapping) else None
        if kind is not None:
            current = [
                r
                for r in current
                if "kind" not in r.model_fields or r.model_fields["kind"].default == kind
            ]
    return sorted({name for r in current for name in r.model_fields})


def _records(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [r for arg in get_args(annotation) for r in _records(arg)]


def nearest(name: str, names: Collection[str]) -> str:
    """The end of an error line: the closest of `names`, or all of them."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return (
        f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(names)) or 'none'}"
    )
