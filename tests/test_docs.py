"""What the documents name exists: links, files, functions, commands. Their prose is wrapped."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import orchestrator.cli.app
import orchestrator.cli.stage
import pipelines.__main__
from contract.recipe import RunConfig
from contract.study import Study
from orchestrator.settings import ServiceSettings

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
WIDTH = 100
FOLDERS = "contract|model|pipelines|workers|orchestrator|studies|benchmarks|tests|docs"
FILE = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\.(?:py|c|md|yaml|json|png)(?![\w/])")
FOLDER = re.compile(rf"`((?:{FOLDERS})/(?:[a-z_]+/)*)`")
NAME = re.compile(rf"((?:{FOLDERS})/[\w./-]+\.py):([A-Za-z_][\w.]*)")
# Each program that `maskray COMMAND` becomes, and which parses its own options.
PROGRAMS = {
    "train": "train.py",
    "proposals": "propose.py",
    "sync": "sync.py",
    "predict": "predict.py",
    "export": "export.py",
    "register": "register.py",
}
OF_THE_READER = {"model/branches/dice.py"}  # the tutorial has its reader write it

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def lines(path: Path) -> Iterator[tuple[bool, str]]:
    """Each line of the document, and whether it is inside a code block."""
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = line.lstrip().startswith("```")
        yield inside or fence, line
        inside ^= fence


def prose(path: Path) -> str:
    return "\n".join(line for is_code, line in lines(path) if not is_code)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(path: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in prose(path).splitlines() if line.startswith("#")}


@cache
def names(path: Path) -> set[str]:
    """`name` and `Class.name` of all that the module defines itself."""
    defined: set[str] = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.ClassDef():
                    defined.add(prefix + node.name)
                    add(node.body, f"{prefix}{node.name}.")
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    defined.add(prefix + node.name)
                case ast.Assign():
                    defined.update(prefix + ast.unparse(target) for target in node.targets)
                case ast.AnnAssign():
                    defined.add(prefix + ast.unparse(node.target))

    add(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return defined


@document
def test_prose_is_wrapped(path: Path) -> None:
    wide = [
        f"{number}: {line}"
        for number, (is_code, line) in enumerate(lines(path), 1)
        if len(line) > WIDTH and not is_code and not line.startswith("|")
    ]
    assert not wide


@document
def test_every_link_resolves(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = (path.parent / file).resolve() if file else path
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


@document
def test_every_file_and_folder_that_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = {*FILE.findall(text), *FOLDER.findall(text)}
    named -= OF_THE_READER
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@document
def test_every_name_in_a_file_exists(path: Path) -> None:
    """`path/file.py:Class.method`: a rename in the code has to reach the page of its ways."""
    pairs = NAME.findall(path.read_text(encoding="utf-8"))
    assert pairs or path.name != "architecture.md"
    assert not [f"{file}:{name}" for file, name in pairs if name not in names(ROOT / file)]


# --- fields of records --------------------------------------------------------------------------


def fields(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Each property of a JSON Schema's node, in every alternative of a union."""
    if "$ref" in node:
        return fields(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    named: dict[str, list[dict[str, Any]]] = {}
    for name, property_ in node.get("properties", {}).items():
        named.setdefault(name, []).append(property_)
    for alternative in [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]:
        for name, properties in fields(schema, alternative).items():
            named.setdefault(name, []).extend(properties)
    return named


def is_field(path: str) -> bool:
    schema = RunConfig.model_json_schema()
    nodes = [schema]
    for name in path.split("."):
        nodes = [below for node in nodes for below in fields(schema, node).get(name, ())]
    return bool(nodes)


@document
def test_every_field_of_a_run_exists(path: Path) -> None:
    parts = "|".join(RunConfig.model_fields)
    named = set(
        re.findall(rf"(?<!from )(?<![\w./])((?:{parts})(?:\.[a-z_][a-z_0-9]*)+)", path.read_text())
    )
    named -= {name for name in named if name.endswith((".py", ".md", ".yaml"))}
    assert not [name for name in sorted(named) if not is_field(name)]


@document
def test_every_example_in_yaml_fits_its_record(path: Path) -> None:
    for text in re.findall(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL):
        example = yaml.safe_load(text)
        if "baseline" in example:
            Study.model_validate(example)
        elif "host" in example:
            ServiceSettings.model_validate(example)
        else:
            assert not [name for name in leaves(example) if name != "preset" and not is_field(name)]


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


# --- commands -----------------------------------------------------------------------------------


def options_of_command(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


@cache
def options_of_program(path: Path) -> set[str]:
    """What the program's `add_argument` calls declare; its imports are too slow to ask itself."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    shared = {"--json", "--debug"} if "add_output_options" in called else set()
    shared |= {"--weights", "--config"} if "add_trained_arguments" in called else set()
    return (
        shared
        | {
            argument.value
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
            for argument in call.args
            if isinstance(argument, ast.Constant)
        }
        | {"--help"}
    )


def maskray_options(words: list[str]) -> set[str]:
    """The options of `maskray WORDS`. Raises KeyError if there is no such command."""
    rest = iter(words)
    first = next(rest, "--help")
    own = get_command(orchestrator.cli.app.app)
    theirs = get_command(pipelines.__main__.app)
    if first.startswith("-"):
        return options_of_command(own)
    if first in PROGRAMS:
        return options_of_program(ROOT / "workers" / PROGRAMS[first])
    if first == "eval":
        return options_of_command(theirs.commands["eval"])
    if first != "data":
        return options_of_command(own.commands[first])
    second = next(rest, "--help")
    if second == "stage":
        return options_of_command(get_command(orchestrator.cli.stage.stage_app))
    data = theirs.commands["data"]
    return options_of_command(data if second.startswith("-") else data.commands[second])


def commands(path: Path) -> Iterator[str]:
    """Command lines in console blocks, and in code spans of the prose."""
    for is_code, line in lines(path):
        if is_code and line.startswith("$ "):
            yield line.removeprefix("$ ").partition(" #")[0]
    yield from re.findall(r"`([^`]+)`", prose(path).replace("\n", " "))


def known_options(words: list[str]) -> set[str] | None:
    """The options of a command of ours, None for other text. KeyError or OSError: there is none."""
    match words:
        case ["maskray", *rest]:
            return maskray_options(rest)
        case ["python", "-m", "pytest", *_]:
            return None
        case ["python" | "torchrun", *rest] if "-m" in rest[:-1]:
            module = rest[rest.index("-m") + 1]
            return options_of_program(ROOT / f"{module.replace('.', '/')}.py")
        case ["python", program, *_] | [program, *_] if re.match(r"benchmarks/\w+\.py$", program):
            return options_of_program(ROOT / program)
        case [program, _, *_] if (ROOT / "benchmarks" / program).is_file():
            return options_of_program(ROOT / "benchmarks" / program)
        case ["make", target, *_]:
            return {"--help"} if f"\n{target}:" in (ROOT / "Makefile").read_text() else None
    return None


def problem(line: str) -> str:
    """What is wrong with a command line, empty if nothing is."""
    try:
        words = shlex.split(line)
    except ValueError:  # prose in a code span
        return ""
    try:
        known = known_options(words)
    except (KeyError, OSError):
        return f"{line}: there is no such command"
    if known is None:
        return f"{line}: the Makefile has no such target" if words[:1] == ["make"] else ""
    start = words.index("-m") + 2 if "-m" in words[:-1] else 1
    given = [word.partition("=")[0] for word in words[start:] if re.match(r"--?[a-z]", word)]
    return "".join(f"{line}: there is no {name}" for name in given if name not in known)


@document
def test_every_command_exists_with_its_options(path: Path) -> None:
    assert not [text for line in commands(path) if (text := problem(line))]


@pytest.mark.parametrize(
    "line",
    [
        "maskray plot study.yaml",
        "maskray run study.yaml --datas coco",
        "maskray data pck --out x",
        "maskray data stage --hear s3://x",
        "maskray train run.yaml --sets a=1",
        "python -m workers.nothing",
        "python benchmarks/loader.py --pear bare",
        "make dmo",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    assert problem(line)


@pytest.mark.parametrize("check", [test_every_link_resolves, test_every_name_in_a_file_exists])
def test_a_wrong_name_is_found(tmp_path: Path, check: Callable[[Path], None]) -> None:
    page = tmp_path / "page.md"
    page.write_text("[gone](gone.md) and contract/record.py:Rekord")
    with pytest.raises(AssertionError):
        check(page)
