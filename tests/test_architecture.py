"""The import table of CONTRIBUTING, enforced on syntax trees. Imports in functions count too."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("contract", "model", "pipelines", "workers", "orchestrator")
CONTRACT = tuple(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "contract").rglob("[a-z]*.py"))
)
CONTRACT_MAY = {
    "__future__",
    "pydantic",
    "yaml",
    "typer",
    *(name for name in sys.stdlib_module_names if name != "asyncio"),
}
# Each room's shelves (folders, and files beside them) from the ground up: a shelf imports those
# before it and none after it. A new shelf takes its place here.
SHELVES = {
    "model": (
        *("boxes", "initial", "losses", "pixels", "sample_hash", "structures", "matching"),
        *("backbone", "rpn", "roi", "branches", "detector", "build", "weights", "export", "cpu"),
        *("gpu", "accelerate"),
    ),
    "pipelines": (
        *("progress", "coco", "shards", "pack", "load", "evaluate", "inspect", "__main__"),
    ),
    "workers": (
        *("trial", "tracking", "pretrained", "training", "inference"),
        *(
            "train",
            "ray_entry",
            "propose",
            "probe",
            "rescore",
            "sync",
            "register",
            "predict",
            "export",
        ),
    ),
    "orchestrator": (
        *("settings", "trial_folder", "client", "study", "travel", "ledger", "cluster"),
        *("schedule", "results"),
        *("local", "face", "server", "cli", "__main__"),
    ),
}
HEAVY = (
    "torch",
    "torchvision",
    "ray",
    "mlflow",
    "numpy",
    "pyarrow",
    "matplotlib",
    "sqlalchemy",
    "fastapi",
    "pycocotools",
)


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module that the file names; `from a import b` names `a` and `a.b`."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join([*package, base]).rstrip(".")
            modules |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            modules |= {
                arg.value
                for arg in node.args[:1]
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            }
    return modules


def names(modules: set[str], package: str) -> set[str]:
    """Those of `modules` that are `package` or inside it."""
    return {name for name in modules if name == package or name.startswith(f"{package}.")}


def ours(imported: set[str], rooms: tuple[str, ...], modules: tuple[str, ...] = ()) -> set[str]:
    """Imports of ours outside the allowed `rooms` and single `modules`."""
    inside = {name for room in OURS for name in names(imported, room)}
    permitted = {name for allowed in (*rooms, *modules) for name in names(inside, allowed)}
    # `from model import structures` names `model` too
    packages = {module.partition(".")[0] for module in modules}
    return inside - permitted - packages


def offences(path: Path) -> set[str]:
    """The modules that the file imports although its room must not."""
    imported = imports(path)
    room = path.relative_to(ROOT).parts[0]
    match room:
        case "contract":
            foreign = {
                name
                for name in imported
                if name.partition(".")[0] not in {*CONTRACT_MAY, "contract"}
            }
            return foreign - names(foreign, "pyarrow")
        case "model":
            bad = ours(imported, ("contract", "model")) | names(imported, "torch.distributed")
            return bad | names(imported, "ray") | names(imported, "mlflow")
        case "pipelines":
            bad = ours(imported, ("contract", "pipelines"), ("model.structures",))
            return bad | names(imported, "ray") | names(imported, "mlflow")
        case "workers":
            bad = ours(imported, ("contract", "model", "pipelines", "workers"))
            bad |= set() if path.name == "ray_entry.py" else names(imported, "ray")
            return bad | (set() if path.name == "mlflow_tracker.py" else names(imported, "mlflow"))
        case _:
            bad = ours(imported, ("contract", "orchestrator")) | names(imported, "torch")
            bad |= names(imported, "torchvision")
            # the ledger alone speaks SQL; the others get its typed rows
            if path.relative_to(ROOT).parts[1] != "ledger":
                bad |= names(imported, "sqlalchemy")
            return bad | (set() if path.name == "jobs.py" else names(imported, "ray"))


@pytest.mark.parametrize("room", OURS)
def test_no_room_imports_what_it_must_not(room: str) -> None:
    assert len(sources(room)) > 2
    bad = {
        str(path.relative_to(ROOT)): sorted(modules)
        for path in sources(room)
        if (modules := offences(path))
    }
    assert not bad


def shelf_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def climbs(path: Path) -> set[str]:
    """What a file imports of its own room from a shelf above its own."""
    room = path.relative_to(ROOT).parts[0]
    order = SHELVES[room]
    own = shelf_of(module_of(path))
    assert own in order, f"{path}: give the shelf {own!r} its place in SHELVES"
    above = {f"{room}.{shelf}" for shelf in order[order.index(own) + 1 :]}
    return {name for shelf in above for name in names(imports(path), shelf)}


@pytest.mark.parametrize("room", SHELVES)
def test_no_shelf_imports_one_above_it(room: str) -> None:
    files = [path for path in sources(room) if shelf_of(module_of(path))]
    assert {shelf_of(module_of(path)) for path in files} == set(SHELVES[room])
    assert not {str(path.relative_to(ROOT)): bad for path in files if (bad := climbs(path))}


@pytest.mark.parametrize("room", OURS)
def test_no_modules_import_each_other_in_a_circle(room: str) -> None:
    modules = {module_of(path): imports(path) for path in sources(room)}
    graph = {
        name: {other for other in modules if other in found and other != name}
        for name, found in modules.items()
        if "." in name
    }
    # Packages are left out: each imports nothing, and `from a import b` names `a` too.
    packages = {name for name in graph if any(other.startswith(f"{name}.") for other in graph)}
    sorter = TopologicalSorter({name: found - packages for name, found in graph.items()})
    sorter.prepare()  # raises CycleError with the modules of the circle


@pytest.mark.parametrize("module", [*CONTRACT, "orchestrator.__main__"])
def test_nothing_heavy_is_loaded_at_import(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["utils", "common", "misc", "helpers"])
def test_there_are_no_drawers(name: str) -> None:
    assert not [path for room in OURS for path in (ROOT / room).rglob(f"{name}.py")]


def test_no_folder_holds_more_than_fifteen_modules() -> None:
    folders = {path.parent for room in OURS for path in sources(room)}
    crowded = {folder for folder in folders if len(list(folder.glob("[a-z]*.py"))) > 15}
    assert not crowded


def test_rooms_import_without_ray_and_mlflow() -> None:
    modules = [
        module_of(path)
        for room in ("contract", "model", "pipelines", "workers")
        for path in sources(room)
        if path.name not in ("__main__.py", "ray_entry.py", "mlflow_tracker.py")
    ]
    code = "import importlib, sys\nsys.modules.update(ray=None, mlflow=None)\n"
    code += f"for name in {modules!r}: importlib.import_module(name)\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("path", "text", "bad"),
    [
        (
            "model/x.py",
            "def f():\n    from pipelines.load.order import Order\n",
            "pipelines.load.order",
        ),
        ("contract/x.py", "from model.boxes import iou\n", "model.boxes"),
        ("contract/x.py", "import numpy\n", "numpy"),
        ("model/x.py", "import torch.distributed as dist\n", "torch.distributed"),
        ("pipelines/x.py", "from model.build import build_detector\n", "model.build"),
        ("pipelines/x.py", "from model import build\n", "model.build"),
        ("workers/x.py", "import ray.train\n", "ray.train"),
        ("workers/x.py", "from orchestrator.client import Client\n", "orchestrator.client"),
        ("orchestrator/x.py", "def f():\n    import torch\n", "torch"),
        ("orchestrator/cli/x.py", "from workers import loop\n", "workers.loop"),
        ("orchestrator/server/x.py", "from sqlalchemy import select\n", "sqlalchemy.select"),
        ("orchestrator/x.py", "import importlib\nimportlib.import_module('ray')\n", "ray"),
    ],
)
def test_the_rules_bite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, text: str, bad: str
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert bad in offences(file)


def test_the_order_of_the_shelves_bites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "orchestrator/ledger/x.py"
    file.parent.mkdir(parents=True)
    file.write_text("def f():\n    from orchestrator.server import views\n")
    assert climbs(file) == {"orchestrator.server", "orchestrator.server.views"}
    file.write_text("from orchestrator.settings import Limits\n")
    assert not climbs(file)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "pipelines/x.py",
            "from model.structures import Batch\nfrom contract.recipe import RunConfig\n",
        ),
        ("contract/x.py", "def f():\n    from pyarrow import fs\n"),
        ("workers/ray_entry.py", "import ray.train\n"),
        ("workers/tracking/mlflow_tracker.py", "import mlflow\n"),
        ("orchestrator/cluster/jobs.py", "import ray\n"),
        ("orchestrator/ledger/x.py", "from sqlalchemy import select\n"),
        (
            "orchestrator/x.py",
            "from contract.record import Record\nfrom contract.command import run_command\n",
        ),
    ],
)
def test_the_rules_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, text: str
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert not offences(file)
