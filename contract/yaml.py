"""YAML that a stranger may have written: run files, studies and settings are read here alone.

Plain data only, bounded in size; every error is one line with its place.
"""

from __future__ import annotations

import math
import re
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import JsonValue

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000  # counted after aliases are expanded
MAX_DEPTH = 50

_Safe: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


class _Loader(_Safe):  # type: ignore[misc]
    """YAML 1.1 reads `1e-3` as text; people mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> tuple[dict[str, JsonValue], str]:
    """The mapping in the file, and its text.

    Raises ValueError or FileNotFoundError with the file and the line.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a YAML file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES:,} bytes, no run or study needs that")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return parse_yaml(text, str(path)), text


def parse_yaml(text: str, where: str) -> dict[str, JsonValue]:
    """The mapping that `text` holds. `where` opens every error."""
    loaded = parse_value(text, where)
    if loaded is None:
        raise ValueError(f"{where}: is empty")
    if not isinstance(loaded, dict):
        raise ValueError(f"{where}: expected fields like 'name: ...', got {type(loaded).__name__}")
    return loaded


def parse_value(text: str, where: str) -> JsonValue:
    """The value that `text` holds, None for an empty text. `where` opens every error."""
    try:
        _refuse_tags(text, where)
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            return None
        _measure(root, where, {}, 0)
        return _plain(root, _Loader(""), where, "")
    except yaml.YAMLError as error:
        raise ValueError(f"{where}{_place(error)}: {_problem(error)}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested deeper than {MAX_DEPTH} levels") from None


def _refuse_tags(text: str, where: str) -> None:
    for event in yaml.parse(text, Loader=_Loader):
        tag = getattr(event, "tag", None)  # only some kinds of event have one
        if tag is not None:
            line = event.start_mark.line + 1 if event.start_mark else 0
            raise ValueError(
                f"{where}, line {line}: YAML tag {tag!r} is not allowed, write plain data"
            )


def _measure(node: yaml.Node, where: str, sizes: dict[int, int], depth: int) -> int:
    """How many values `node` stands for once its aliases are written out."""
    if depth > MAX_DEPTH:
        raise ValueError(
            f"{where}, line {node.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels"
        )
    if id(node) in sizes:
        if sizes[id(node)] < 0:
            raise ValueError(f"{where}, line {node.start_mark.line + 1}: an alias contains itself")
        return sizes[id(node)]
    sizes[id(node)] = -1
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_measure(child, where, sizes, depth + 1) for child in children)
    if size > MAX_VALUES:
        raise ValueError(
            f"{where}: stands for more than {MAX_VALUES:,} values once its aliases are written out"
        )
    sizes[id(node)] = size
    return size


def _plain(node: yaml.Node, scalars: yaml.SafeLoader, where: str, path: str) -> JsonValue:
    place = f"{where}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, scalars, where, f"{path}[{i}]") for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        result: dict[str, JsonValue] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, place if path == "" else f"{place}: {path}")
            below = f"{path}.{key}" if path else key
            if key in result:
                raise ValueError(
                    f"{where}, line {key_node.start_mark.line + 1}: {below} is given twice"
                )
            result[key] = _plain(value_node, scalars, where, below)
        return result
    try:
        value: JsonValue | date = scalars.construct_object(node)
    except ValueError as error:
        raise ValueError(f"{place}: {path}: {error}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: {path}: {node.value} is not a finite number")
    return str(node.value) if isinstance(value, date) else value  # a date as it was written


def _key(node: yaml.Node, place: str) -> str:
    """A name as text: a bare 2 is "2". A bare `on` is refused, since YAML reads a boolean."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{place}: a name must be text")
    if node.tag == "tag:yaml.org,2002:merge":
        raise ValueError(f"{place}: '<<' is not supported, write the fields out")
    if node.tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"):
        raise ValueError(
            f"{place}: YAML does not read {node.value!r} as text; put the name in quotes"
        )
    return str(node.value)


def _place(error: yaml.YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return f", line {mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return " ".join(part for part in (error.context, error.problem) if part)
    return " ".join(str(error).split())
