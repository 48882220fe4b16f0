"""`Files`: whole or not at all, under names that no two writers share, patient with stores."""

from __future__ import annotations

import errno
import pickle
import threading
from pathlib import Path

import pytest

from contract import files
from contract.files import Files, FullDiskError, UnreachableStoreError, retried, split, uri_join


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Files(str(tmp_path))
    store.write("a/b.json", b"old")

    def write_half() -> None:
        with store.replacing("a/b.json") as sink:
            sink.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert store.read("a/b.json") == b"old"
    assert store.names("a") == ["b.json"]


def test_writers_of_one_file_never_meet(tmp_path: Path) -> None:
    """A partial name that two writers share would mix their contents or lose one."""
    store, errors = Files(str(tmp_path)), []
    contents = [bytes([65 + number]) * 200_000 for number in range(8)]

    def write(content: bytes) -> None:
        try:
            for _ in range(5):
                store.write("result.json", content)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    seen = {store.read_part("result.json") for _ in range(50)}
    for thread in threads:
        thread.join()
    assert not errors
    assert store.read("result.json") in contents
    assert seen <= {None, *contents}
    assert store.names() == ["result.json"]


def test_what_is_missing_has_one_answer_for_each_question(tmp_path: Path) -> None:
    store = Files(str(tmp_path / "none"))
    assert not store.exists()
    assert not store.exists("a")
    assert store.size("a") is None
    assert (store.names(), store.folder_bytes()) == ([], 0)
    assert store.read_part("a") is None
    store.delete("a")
    with pytest.raises(FileNotFoundError):
        store.read("a")


def test_parts_and_folders(tmp_path: Path) -> None:
    store = Files(str(tmp_path))
    store.write("x/a.json", b'{"loss": 1}')
    store.write("x/b", b"12345")
    assert store.read_part("x/a.json", 2, 4) == b"loss"
    assert store.read_part("x/a.json", 1000) == b""
    assert store.folder_bytes("x") == 11 + 5
    store.delete("x")
    assert store.names() == []


def test_a_flaky_store_is_tried_again_and_a_dead_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "FIRST_PAUSE_S", 0.0)
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise OSError(errno.EIO, "flaky")
        return "there"

    assert retried(flaky, "s3://b/a") == "there"
    assert len(calls) == 3

    def dead() -> None:
        raise OSError(errno.EIO, "dead")

    with pytest.raises(UnreachableStoreError, match=r"s3://b/a: .*dead; tried 2 times") as caught:
        retried(dead, "s3://b/a", tries=2)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, RuntimeError)  # exit 1: the world's fault


def test_a_full_disk_is_an_error_of_the_disk_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    store = Files(str(tmp_path), when_full="buy a larger one")
    with pytest.raises(
        FullDiskError, match=r"no space left .* writing a; buy a larger one"
    ) as caught:
        store.write("a", b"1")
    assert isinstance(caught.value, OSError)  # who waits for a disk waits for this one too
    assert caught.value.errno == errno.ENOSPC
    assert store.names() == []


def test_a_full_disk_and_a_missing_file_are_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "FIRST_PAUSE_S", 1000.0)
    for error in (FileNotFoundError("gone"), OSError(errno.ENOSPC, "full")):

        def fail(error: OSError = error) -> None:
            raise error

        with pytest.raises(type(error)):
            retried(fail, "a")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gopher://x", "gopher://x: not a URI that pyarrow.fs opens here"),
        ("hdfs://node/x", "'hdfs' is none of s3, gs, gcs, file"),
        ("s3://", "names no bucket"),
        ("s3://key:secret@", "names no bucket"),
    ],
)
def test_a_uri_that_cannot_be_opened_is_named_without_its_password(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Files(uri).exists("a")
    assert "secret" not in str(caught.value)


def test_an_instance_travels_to_a_worker_unopened(tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(Files(f"file://{tmp_path}", tries=2)))
    again.write("a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert (again.tries, again.local) == (2, tmp_path)


def test_a_query_stays_at_the_end_of_a_uri() -> None:
    assert uri_join("s3://b/data?region=x", "train", "a") == "s3://b/data/train/a?region=x"
    assert uri_join("/data/", "what?", "a") == "/data/what?/a"
    assert split("s3://b/data/p.arrow?region=x") == ("s3://b/data?region=x", "p.arrow")
    assert split("p.arrow") == (".", "p.arrow")
    assert split("/p.arrow") == ("/", "p.arrow")
