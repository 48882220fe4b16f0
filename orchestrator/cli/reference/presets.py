"""`maskray presets`: the architectures by name, and all values of one with where they are from."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import AsJson, Debug, print_result


def register(app: typer.Typer) -> None:
    app.command()(presets)


def presets(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Without it: all names.")] = "",
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the presets, or print a preset's whole recipe as a run file."""
    from contract.presets import PRESETS
    from contract.run_file import complete_run

    if not name:
        print_result({"presets": list(PRESETS)}, "\n".join(PRESETS), json)
        return
    run = complete_run(name)
    print_result({"preset": name, "run": run}, _with_origins(name), json)


def _with_origins(name: str) -> str:
    """The preset as YAML. A line that is not the default of its record says so."""
    import yaml

    from contract.run_file import complete_run

    run = complete_run(name)
    own = _leaves(run)
    usual = _leaves(complete_run())
    lines = [f"# preset {name}; lines that the preset sets end in '# {name}', others are defaults"]
    text = yaml.safe_dump(run, sort_keys=False, default_flow_style=None, width=1000)
    path: list[str] = []
    for line in text.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        key = line.strip().partition(":")[0]
        path = [*path[:indent], key]
        dotted = ".".join(path)
        # a short record stands in one line with all its fields
        below = dotted + "." if "{" in line else dotted
        differs = any(
            value != usual.get(leaf)
            for leaf, value in own.items()
            if leaf == dotted or (leaf.startswith(below) and below != dotted)
        )
        lines.append(f"{line}  # {name}" if differs else line)
    return "\n".join(lines)


def _leaves(value: object, path: str = "") -> dict[str, object]:
    """Dotted path to each value that is no record."""
    if not isinstance(value, dict):
        return {path: value}
    inner = {
        name: _leaves(item, f"{path}.{name}" if path else name) for name, item in value.items()
    }
    return {leaf: item for leaves in inner.values() for leaf, item in leaves.items()}
