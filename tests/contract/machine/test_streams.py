"""Closed pipes, ASCII and narrow terminals: the real commands, in processes of their own."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.pipelines.tiny_coco import box_annotation, pack_folder, write_coco

ROOT = Path(__file__).parents[3]
CATEGORIES = [{"id": 3, "name": "naïve 猫"}, {"id": 7, "name": "a" * 40}]
CATEGORIES += [{"id": id, "name": f"c{id}"} for id in (8, 9)]  # as many as studies/demo.yaml has


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder, [box_annotation(1)], categories=CATEGORIES)
    pack_folder(folder)
    for split in ("train", "val"):
        (folder / split).symlink_to(folder / "packed")
    (folder / "study.yaml").write_text(
        "# ü" + (ROOT / "studies/demo.yaml").read_text("utf-8"), encoding="utf-8"
    )
    return folder


def command(name: str, folder: Path) -> list[str]:
    maskray = [sys.executable, "-m", "orchestrator"]
    return {
        "help": [*maskray, "--help"],
        "train help": [*maskray, "train", "--help"],
        "show": [*maskray, "data", "show", str(folder / "packed")],
        "plan": [*maskray, "plan", str(folder / "study.yaml"), "--data", str(folder)],
        "mistake": [*maskray, "plan", str(folder / "nicht-da-ß.yaml")],
    }[name]


COMMANDS = ("help", "train help", "plan")
ASCII = (
    {"LANG": "C", "PYTHONIOENCODING": "ascii"},
    # without Python's own way out of the C locale
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
)


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PY"))}
    return {**kept, **more, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_has_ended_ends_a_command_without_a_word(packed, name):
    process = subprocess.Popen(
        command(name, packed), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # `head -0`
    told = process.stderr.read().splitlines()
    assert [line for line in told if not line.startswith(b"warning: data.val ")] == []
    process.stderr.close()
    assert process.wait() in (1, 141)


def test_a_reader_of_errors_that_has_ended_is_no_error_either(packed):
    process = subprocess.Popen(
        command("mistake", packed), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    process.stdout.close()  # `2>&1 | head -0`
    assert process.wait() in (1, 141)


def test_a_full_disk_under_the_output_is_one_line():
    code = "from contract.command import run_command as r; exit(r(lambda: print('x') or 0, []))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("[Errno 28] No space left on device\n")
    assert done.stderr.count("\n") == 1


def test_a_broken_connection_is_still_told(capsys):
    from contract.command import run_command

    def lose() -> int:
        raise BrokenPipeError(32, "the store hung up")

    assert run_command(lose, []) == 1
    assert "the store hung up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "variables"),
    [("show", ASCII[1]), ("plan", ASCII[1]), ("mistake", ASCII[0]), ("mistake", ASCII[1])],
)
def test_an_ascii_terminal_gets_every_word(packed, name, variables):
    done = subprocess.run(
        command(name, packed), cwd=ROOT, capture_output=True, env=environment(**variables)
    )
    said = (done.stdout + done.stderr).decode("ascii")  # it is ASCII
    assert "codec" not in said
    assert "Traceback" not in said
    assert done.returncode == (2 if name == "mistake" else 0), said
    assert {"show": r"na\xefve \u732b", "plan": "trials", "mistake": r"nicht-da-\x"}[name] in said


def test_signs_of_ours_have_an_ascii_form():
    code = (
        "from contract.command import run_command as r\n"
        "r(lambda: print('53.2 \\u00b10.3 \\u2026 \\u00e9') or 0, [])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        env=environment(PYTHONIOENCODING="ascii"),
    )
    assert done.stdout == b"53.2 +-0.3 ... \\xe9\n"


def on_a_terminal(words: list[str], columns: int) -> tuple[int, str]:
    """Status and output of a program on a terminal of this width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment(COLUMNS=str(columns), TERM="xterm", LANG="C.UTF-8"),
    )
    os.close(follower)
    said = b""
    while True:
        try:
            part = os.read(leader, 1 << 16)
        except OSError:  # all ends of the other side are closed
            part = b""
        if not part:
            break
        said += part
    os.close(leader)
    return process.wait(), said.decode()


@pytest.mark.parametrize("name", [*COMMANDS, "show"])
def test_a_narrow_terminal_is_no_error(packed, name):
    status, said = on_a_terminal(command(name, packed), 20)
    assert status == 0, said
    assert "Traceback" not in said
    if name == "show":
        assert "naïve 猫" in said


def test_tables_keep_whole_names_on_a_narrow_terminal():
    code = """if True:
        from contract.answers import QueueEntry
        from orchestrator.cli.tables import print_queue
        entry = QueueEntry(trial="t", key="roi=align,seed=0", study="s", study_name="tables",
            owner="o", state="queued", priority=0, position=1, needs="2 ranks x 1 CPU", why="")
        print_queue([], [entry])
    """
    status, said = on_a_terminal([sys.executable, "-c", code], 20)
    assert status == 0, said
    assert "…" not in said
    assert "roi=align" in said


def test_the_bar_of_a_training_stays_on_one_line_of_a_narrow_terminal():
    code = """if True:
        from contract.attempt import Progress
        from workers.tracking.console import progress_shower
        show = progress_shower()
        for step in (1, 2, 3):
            show(Progress(attempt=1, phase='training', updated_at=0.0, step=step, steps=3,
                loss=1.0, images_per_s=2.0, seconds_left=3.0))
    """
    status, said = on_a_terminal([sys.executable, "-c", code], 20)
    assert status == 0, said
    lines = said.split("\r\x1b[K")[1:]
    assert len(lines) == 3
    assert all(len(line) < 20 for line in lines)


def test_a_training_goes_on_when_nobody_reads_its_progress():
    code = """if True:
        import sys
        from contract.attempt import Progress
        from contract.command import run_command
        from workers.tracking.console import progress_shower
        def train():
            show = progress_shower()
            for step in range(9):
                show(Progress(attempt=1, phase='training', updated_at=0.0, step=step, steps=9))
            print("trained", file=sys.stderr)
            return 0
        sys.exit(run_command(train, []))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"trained\n"
    process.stderr.close()
    assert process.wait() == 0
