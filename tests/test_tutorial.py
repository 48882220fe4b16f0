"""docs/tutorial.md as its reader walks it: each command and each edit, in a copy of the tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
# What makes the study as small as a test can pay.
SMALLER = {
    "--images 500": "--images 24",
    "loop.steps: 300": "loop.steps: 4",
    "seeds: 3\n": "seeds: 1\n",
}


@dataclass(frozen=True)
class Block:
    """A block of code, and the file that the prose before it names last."""

    kind: str
    text: str
    path: str


def blocks(page: str) -> Iterator[Block]:
    path = ""
    for prose, kind, text in re.findall(r"(.*?)^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.M):
        path = [path, *re.findall(r"`([\w./]+\.(?:py|yaml))`", prose)][-1]
        yield Block(kind, text, path)


class Reader:
    """Somebody with a fresh clone, an own home, and the packages that `make install` brings."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "maskray"
        self.printed: dict[str, str] = {}  # by command
        self._activate = ""
        (folder / "home").mkdir()
        (folder / "tmp").mkdir()
        own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "DISPLAY": ""}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MASKRAY", "VIRTUAL"))}
        self._environment = {**kept, **own, "PATH": "/usr/local/bin:/usr/bin:/bin"}
        clone(self.tree)
        install(self.tree)

    def run(self, command: str) -> str:
        """What the command prints. `source` holds for the commands after it."""
        done = subprocess.run(
            ["bash", "-c", self._activate + command],
            cwd=self.tree,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if command.startswith("source "):
            self._activate = f"{command}\n"
        self.printed[command.strip()] = done.stdout
        return done.stdout

    def edit(self, block: Block) -> None:
        """A diff changes its file; any other text is the whole file."""
        file = self.tree / block.path
        if block.kind != "diff":
            assert not file.exists(), f"{block.path} exists already"
            file.write_text(block.text)
            return
        lines = block.text.splitlines()
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        source = file.read_text()
        assert source.count(old) == 1, f"{block.path} has {source.count(old)} times: {old}"
        file.write_text(source.replace(old, new))


def clone(tree: Path) -> None:
    """The files of the working tree that git would take, committed."""
    git = ("git", "-c", "user.name=reader", "-c", "user.email=reader@example.org", "-C")
    listed = (*git, str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in subprocess.run(listed, capture_output=True, check=True).stdout.split(b"\0"):
        source = ROOT / os.fsdecode(name)
        if name and source.is_file():
            copy = tree / os.fsdecode(name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "tree"]):
        subprocess.run([*git, str(tree), *words], check=True)


def install(tree: Path) -> None:
    """What `make install` leaves, of the packages that run this test."""
    venv = tree / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python3*/site-packages")
    # The tree goes first, so that no editable installation of another tree is found.
    paths = [str(tree), *{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
    (packages / "tree.pth").write_text("\n".join(paths))
    scripts = [path for path in Path(sysconfig.get_path("scripts")).iterdir() if path.is_file()]
    for script in scripts:
        head, _, rest = script.read_bytes().partition(b"\n")
        if head.startswith(b"#!") and b"python" in head and not script.is_symlink():
            copy = venv / "bin" / script.name
            copy.write_bytes(f"#!{venv}/bin/python\n".encode() + rest)
            copy.chmod(0o755)
    for compiled in ROOT.glob("maskray_native*.so"):
        shutil.copy2(compiled, tree / compiled.name)
    (venv / ".installed").touch()


@pytest.fixture
def reader() -> Iterator[Reader]:
    folder = Path(tempfile.mkdtemp(prefix="mr-"))  # short: Ray's sockets have at most 107 bytes
    one = Reader(folder)
    try:
        yield one
    finally:
        subprocess.run([one.tree / ".venv/bin/maskray", "down"], cwd=one.tree, check=True)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_the_tutorial_works_as_it_is_printed(reader: Reader) -> None:
    page = PAGE.read_text()
    for large, small in SMALLER.items():
        assert page.count(large) == 1, large
        page = page.replace(large, small)
    for block in blocks(page):
        if block.kind == "console":
            for line in block.text.splitlines():
                reader.run(line.removeprefix("$ ").partition(" #")[0])
        elif block.kind:
            reader.edit(block)

    passed = next(text for line, text in reader.printed.items() if "pytest" in line)
    assert re.search(r"\d+ passed", passed)
    assert "dice" in reader.printed["maskray run dice.yaml --data data/packed"]
    assert "workflowType=machine_learning" in reader.printed["maskray ui last"]
    predicted = reader.tree / "predicted"
    images = list((reader.tree / "data/mine/images/val").iterdir())
    assert len(list((predicted / "pictures").iterdir())) == len(images) > 0
    assert isinstance(json.loads((predicted / "results" / "segm.json").read_text()), list)
