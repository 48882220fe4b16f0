"""Two users on one machine, and temporary folders with long paths."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from contract.attempt import RunSpec
from contract.files import Files
from contract.machine import folders
from contract.machine.folders import (
    fork_server,
    own_folder,
    own_name,
    scratch,
    short_folder,
    user_name,
)
from orchestrator.local import ray_head
from pipelines.shards.cache import Cache
from workers.tracking.spool import _spool_folder
from workers.trial.errors import cause_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def long_folder(base: Path, length: int = 76) -> Path:
    folder = Path(str(base) + "/" + "x" * (length - len(str(base)) - 1))
    folder.mkdir(parents=True)
    return folder


def test_folders_carry_the_users_name(temporary):
    with scratch("code") as name:
        assert user_name() in Path(name).name
    assert own_folder("spool").name == f"maskray-spool-{user_name()}"
    assert own_folder("spool").stat().st_mode & 0o777 == 0o700
    assert Cache("", 1.0).folder == temporary / own_name("cache")


def test_two_users_of_one_machine_do_not_meet(temporary, monkeypatch):
    spec = RunSpec.model_construct(trial="t", cache="")
    mine = _spool_folder(spec, Files("s3://bucket/x?region=us-east-1"))
    monkeypatch.setattr(folders, "user_name", lambda: "somebody")
    assert _spool_folder(spec, Files("s3://bucket/x?region=us-east-1")) != mine


def test_a_user_without_a_name_has_a_number(monkeypatch):
    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(folders.pwd, "getpwuid", unknown)
    assert user_name() == str(os.getuid())


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_folder_of_somebody_else_is_not_used(temporary):
    folder = own_folder("cache")
    os.chown(folder, 12345, 12345)
    with pytest.raises(ValueError, match="belongs to another user; set TMPDIR"):
        own_folder("cache")


@pytest.mark.parametrize("length", [40, 75, 76, 90])
def test_workers_start_below_a_temporary_folder_of_any_length(length, tmp_path_factory):
    # A process of its own, because a fork server lives as long as its process.
    base = Path(tempfile.mkdtemp(prefix="t"))
    code = (
        "from contract.machine.folders import fork_server\n"
        "if __name__ == '__main__':\n"
        "    context = fork_server([])\n"
        "    with context.Pool(1) as pool: print(pool.apply(abs, (-3,)))\n"
        "    import tempfile; print(tempfile.gettempdir())\n"
    )
    script = base / "script.py"
    script.write_text(code)
    folder = long_folder(base, length)
    done = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["3", str(folder)], done.stderr
    assert not list(folder.iterdir())


def test_without_any_short_folder_the_message_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(long_folder(tmp_path, 120)))
    monkeypatch.setattr(folders, "_SHORT", (str(tmp_path / "none"),))
    for start in (lambda: fork_server([]), ray_head.folder_for_sockets, lambda: short_folder(75)):
        with pytest.raises(ValueError, match=r"x is too long .* set TMPDIR to a short path"):
            start()


@pytest.mark.parametrize("length", [20, 76, 110])
def test_a_ray_heads_sockets_fit(length, tmp_path, monkeypatch):
    base = Path(tempfile.mkdtemp(prefix="t"))
    monkeypatch.setattr(tempfile, "tempdir", str(long_folder(base, length)))
    monkeypatch.setattr(ray_head, "user_name", lambda: "a-very-long-user-name")
    folder = ray_head._short_folder()
    Path(folder).rmdir()
    assert "a-very-long-" in folder
    session = "session_2026-01-01_00-00-00_123456_1234567"
    assert len(f"{folder}/{session}/sockets/plasma_store_1") <= 107


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError("AF_UNIX path too long"), "set TMPDIR"),
        (PermissionError(13, "Permission denied", "/x"), "/x'; let this user write there"),
        (OSError(30, "Read-only file system", "/x"), "let this user write there"),
        (OSError(36, "File name too long"), "shorter path"),
        (OSError(24, "Too many open files"), "ulimit -n"),
    ],
)
def test_an_error_of_a_persons_environment_is_final_and_says_what_to_set(error, remedy):
    cause = cause_of(error, 0)
    assert cause.error_class == "person"
    assert remedy in cause.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "I/O error")])
def test_an_error_of_a_node_is_tried_elsewhere(error):
    assert cause_of(error, 0).error_class == "node"


def test_the_loader_and_the_encoders_share_the_one_fork_server():
    assert isinstance(fork_server([]), type(multiprocessing.get_context("forkserver")))
    for path in ("pipelines/load/loader.py", "workers/training/results.py"):
        assert "fork_server(" in (ROOT / path).read_text("utf-8")
        assert 'get_context("forkserver")' not in (ROOT / path).read_text("utf-8")
