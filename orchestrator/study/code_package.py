"""The code of a study: the submitter's own tree as one zip that is named by its content.

The packages stand at the top of the zip, so that Ray can take it as a working directory.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PACKAGES = ("contract", "model", "pipelines", "workers", "orchestrator")
# What a trial's numbers can depend on. The orchestrator only starts it and reads what it leaves.
SOURCES_OF_A_RUN = tuple(name for name in PACKAGES if name != "orchestrator")
# Top-level folders that no run imports.
LEFT_OUT = ("tests", "docs", "benchmarks", "studies", ".ci", ".github")
# An untracked file of another kind may be data, or a secret like `.env`: it stays at home.
UNTRACKED_KINDS = (
    *(".py", ".pyi", ".json", ".yaml", ".yml", ".toml", ".mako", ".j2"),
    *(".c", ".cc", ".cpp", ".cu", ".cuh", ".h"),
)
PROJECT = "maskray"  # the name in pyproject.toml by which a tree is recognised
# What the service and `maskray submit` start in the package, so what makes one. A tree of another
# version may have other packages and other files in them, but it has these.
ENTRY_POINTS = ("workers/ray_entry.py", "orchestrator/travel.py")
MAX_MIB = 64  # the service keeps every package, and each node of the cluster unpacks it


@dataclass(frozen=True)
class CodePackage:
    """`sha256` names `data`, the zip. `source_hash` covers what a trial's numbers can depend on.

    `origin` says in words where it came from. `commit` is empty outside git, and ends in "-dirty"
    if the tree differs from it.
    """

    sha256: str
    data: bytes
    source_hash: str
    origin: str
    commit: str = ""


def package(root: Path, ref: str = "") -> CodePackage:
    """The tree around `root`, or its commit `ref`.

    Takes tracked files, and untracked ones of a source kind that git does not ignore. Without a
    maskray tree around `root` it takes the installed sources. Raises ValueError if `ref` is no
    commit, if a link leaves the tree, or if the whole is too large to send.
    """
    tree = _tree_around(root)
    if tree is None:
        if ref:
            raise ValueError(
                f"--code {ref}: {root} is in no git tree of maskray, so it has no commits"
            )
        return _pack(installed(), "installed sources", "")
    if ref:
        commit = _commit(tree, ref)
        return _pack(_files_of_commit(tree, commit), f"commit {commit[:12]}", commit)
    commit = _head(tree)
    dirty = bool(_git(tree, "status", "--porcelain"))
    name = f"{commit}-dirty" if commit and dirty else commit
    return _pack(_files_of_tree(tree), f"working tree {tree}", name)


def source_hash(files: Mapping[str, bytes]) -> str:
    """SHA-256 over names and bytes of the run's sources, not of tests, docs or the orchestrator."""
    digest = hashlib.sha256()
    for name in sorted(files):
        if name.partition("/")[0] in SOURCES_OF_A_RUN:
            digest.update(f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return digest.hexdigest()


def installed_source_hash() -> str:
    """The hash of the sources that this process itself runs."""
    return source_hash(installed())


def _pack(files: Mapping[str, bytes], origin: str, commit: str) -> CodePackage:
    missing = [name for name in ENTRY_POINTS if name not in files]
    if missing:
        raise ValueError(f"{origin}: has no {missing[0]}, so it cannot run a trial")
    size = sum(len(content) for content in files.values())
    if size > MAX_MIB * 2**20:
        largest = sorted(files, key=lambda name: -len(files[name]))[:3]
        named = ", ".join(f"{name} ({len(files[name]) / 2**20:.1f} MiB)" for name in largest)
        raise ValueError(
            f"{origin}: the code is {size / 2**20:.0f} MiB, at most {MAX_MIB} travel with a study; "
            f"largest: {named}; keep data out of git's sight (.gitignore)"
        )
    buffer = io.BytesIO()
    # Stored without compression, with one date and one mode: the bytes, and so the name, depend on
    # the sources alone, not on a version of zlib or on when the files were checked out.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, wherever it is made
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])
    data = buffer.getvalue()
    return CodePackage(hashlib.sha256(data).hexdigest(), data, source_hash(files), origin, commit)


# --- where files come from --------------------------------------------------------------------


def _tree_around(root: Path) -> Path | None:
    """The top of the git tree that holds `root`, if it is one of maskray."""
    try:
        top = Path(_git(root, "rev-parse", "--show-toplevel").decode().rstrip("\n"))
    except (RuntimeError, FileNotFoundError):  # not a git tree, or no git on this machine
        return None
    return top if _project_name(top) == PROJECT else None


def _project_name(tree: Path) -> str:
    """The name in the tree's `pyproject.toml`; empty if it has none that can be read."""
    try:
        text = (tree / "pyproject.toml").read_text(encoding="utf-8")
        return str(tomllib.loads(text)["project"]["name"])
    except (OSError, ValueError, KeyError, TypeError):  # another project's file has any form
        return ""


def installed() -> dict[str, bytes]:
    """The packages beside the one that this module belongs to, without what Python compiled."""
    top = Path(__file__).resolve().parents[2]
    return {
        path.relative_to(top).as_posix(): path.read_bytes()
        for name in PACKAGES
        for path in (top / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _files_of_tree(tree: Path) -> dict[str, bytes]:
    tracked = _names(_git(tree, "ls-files", "-z", "--cached"))
    untracked = _names(_git(tree, "ls-files", "-z", "--others", "--exclude-standard"))
    wanted = [*tracked, *(name for name in untracked if name.endswith(UNTRACKED_KINDS))]
    files: dict[str, bytes] = {}
    for name in filter(_is_packed, wanted):
        path = tree / name
        # The link's target may be a key or a dataset of somebody else's.
        if path.is_symlink() and not path.resolve().is_relative_to(tree.resolve()):
            raise ValueError(
                f"{path}: a link that leaves the tree cannot travel with a study; copy its target"
            )
        if path.is_file():  # a tracked file may be deleted, or be a submodule's folder
            files[name] = path.read_bytes()
    return files


def _files_of_commit(tree: Path, commit: str) -> dict[str, bytes]:
    archive = _git(tree, "archive", "--format=tar", commit)
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and _is_packed(member.name):
                files[member.name] = content.read()
    return files


def _is_packed(name: str) -> bool:
    return PurePosixPath(name).parts[0] not in LEFT_OUT


def _names(listing: bytes) -> list[str]:
    # Names in a tree are bytes and need not be UTF-8; this keeps each as it is.
    return [name for name in listing.decode("utf-8", "surrogateescape").split("\0") if name]


def _commit(tree: Path, ref: str) -> str:
    # A reference is a person's text: one that starts with "--" must not become an option of git.
    verify = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    try:
        return _git(tree, *verify).decode().strip()
    except RuntimeError:
        raise ValueError(
            f"--code {ref}: {tree} has no such commit; see 'git log' and 'git branch'"
        ) from None


def _head(tree: Path) -> str:
    try:
        return _git(tree, "rev-parse", "--verify", "--quiet", "HEAD").decode().strip()
    except RuntimeError:  # a tree before its first commit
        return ""


def _git(where: Path, *arguments: str) -> bytes:
    """What git prints. Raises RuntimeError with its last words, FileNotFoundError without git."""
    command = ["git", "-C", str(where), *arguments]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"git {arguments[0]}: {done.stderr.decode(errors='replace').strip() or done.returncode}"
        )
    return done.stdout
