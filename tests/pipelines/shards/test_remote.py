"""A real S3 endpoint over HTTP: moto's server on 127.0.0.1, behind a proxy that can cut it off."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from contract import files
from contract.command import run_app
from contract.data import DataConfig
from contract.files import Files
from contract.model import ImageInput
from pipelines.__main__ import app
from pipelines.inspect.verify import verify
from pipelines.load.loader import EvalLoader, TrainLoader
from pipelines.pack.join import join
from pipelines.pack.pack import PackOptions, pack
from pipelines.shards.cache import Cache
from pipelines.shards.dataset import Dataset, open_dataset, stage_datasets
from pipelines.shards.manifest import FileEntry

SHARD = "shard-00002.arrow"


class CuttingProxy(socketserver.ThreadingTCPServer):
    """Forwards to `target`; while `cuts` is positive, each answer of more than 4 KiB is cut there.

    While it is `away`, it hangs up on whoever calls, and counts the calls.
    """

    daemon_threads = True

    def __init__(self, target: tuple[str, int]):
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target, self.cuts, self.lock = target, 0, threading.Lock()
        self.away, self.calls = False, 0

    def cut(self) -> bool:
        with self.lock:
            self.cuts -= 1
            return self.cuts >= 0


class _Forward(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, CuttingProxy)
        if self.server.away:
            self.server.calls += 1
            return
        with socket.create_connection(self.server.target) as upstream:
            threading.Thread(target=_pump, args=(self.request, upstream), daemon=True).start()
            sent = 0
            while piece := _receive(upstream):
                if sent + len(piece) > 4096 and self.server.cuts > 0 and self.server.cut():
                    self.request.sendall(piece[: max(0, 4096 - sent)])
                    self.request.shutdown(socket.SHUT_RDWR)
                    return
                sent += len(piece)
                try:
                    self.request.sendall(piece)
                except OSError:
                    return


def _receive(source: socket.socket) -> bytes:
    try:
        return source.recv(2048)
    except OSError:
        return b""


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while piece := _receive(source):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the other side has gone


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[CuttingProxy, str]]:
    """The proxy before an empty S3, and the query of a URI that leads through it."""
    saved = dict(os.environ)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = CuttingProxy(server.get_host_and_port())
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield (
            proxy,
            f"endpoint_override=127.0.0.1:{proxy.server_address[1]}&scheme=http&region=us-east-1",
        )
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()
        os.environ.clear()
        os.environ.update(saved)


@pytest.fixture(scope="module")
def bucket(s3, shapes):
    """A client and the URI of the training data in the bucket."""
    proxy, query = s3
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{proxy.server_address[1]}", region_name="us-east-1"
    )
    client.create_bucket(Bucket="data")
    for path in (shapes / "train").iterdir():
        client.upload_file(str(path), "data", f"train/{path.name}")
    yield client, f"s3://data/train?{query}"
    client.close()


@pytest.fixture
def restored(bucket, shapes, s3) -> Iterator[str]:
    """The URI; whatever a test does to a shard is undone."""
    client, uri = bucket
    yield uri
    s3[0].cuts, s3[0].away = 0, False
    client.upload_file(str(shapes / "train" / SHARD), "data", f"train/{SHARD}")


def contents(dataset: Dataset) -> list[tuple[int, bytes]]:
    return [(row.image_id, bytes(row.content)) for row in (dataset.row(n) for n in dataset.rows())]


def test_remote_data_streams_through_the_cache(bucket, shapes, tmp_path):
    remote = open_dataset(bucket[1], str(tmp_path / "cache"))
    local = open_dataset(str(shapes / "train"))
    assert remote.manifest.hash == local.manifest.hash
    assert not (tmp_path / "cache").exists(), "nothing is fetched before it is needed"
    assert contents(remote) == contents(local)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == local.manifest.num_shards + 1
    assert not list((tmp_path / "cache").glob("*.part"))


def test_loaders_stream_from_s3_in_workers(bucket, shapes, tmp_path):
    dataset = open_dataset(bucket[1], str(tmp_path / "cache"))
    cfg = DataConfig(train="t", val="v", num_loader_workers=1)
    stream = EvalLoader(
        cfg, dataset, ImageInput(short_side_px=32), batch_size=16, rank=0, world_size=1
    )
    image_ids = sorted(i for batch in stream for i in batch.sample_ids.tolist())
    stream.close()
    assert image_ids == list(range(1, 41))


def test_after_staging_training_asks_the_store_for_nothing(restored, s3, shapes, tmp_path, capsys):
    cache = str(tmp_path / "cache")
    assert run_app(app, ["data", "stage", restored, "--cache", cache, "--json"], "maskray") == 0
    told = json.loads(capsys.readouterr().out)
    local = open_dataset(str(shapes / "train"))
    [node] = told["nodes"]
    assert (told["ok"], node["cache"], node["evicted"]) == (True, cache, 0)
    assert node["bytes"] == sum(entry.bytes for entry in local.files)
    dataset = open_dataset(restored, cache)
    s3[0].away = True
    cfg = DataConfig(train="t", val="v", short_sides_px=(32,), num_loader_workers=1)
    fields = {
        "seed": 0,
        "global_batch": 8,
        "rank": 0,
        "world_size": 1,
        "max_images_per_forward": 8,
        "masks": True,
    }
    remote, expected = TrainLoader(cfg, dataset, **fields), TrainLoader(cfg, local, **fields)
    for one, two in itertools.islice(zip(remote, expected, strict=False), remote.steps_per_epoch):
        assert torch.equal(one.batches[0].images, two.batches[0].images)
    remote.close()
    expected.close()
    assert s3[0].calls == 0


def test_cut_connections_are_tried_again(restored, s3, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FIRST_PAUSE_S", 0.0)
    dataset = open_dataset(restored, str(tmp_path / "cache"))
    assert dataset.index
    s3[0].cuts = 3
    assert contents(dataset) == contents(open_dataset(str(shapes / "train")))
    assert s3[0].cuts <= 0, "connections were cut"


def test_a_store_that_stays_away_is_named(shapes, tmp_path, monkeypatch):
    class Gone(Files):
        def copy_to(self, name, target, also):
            raise OSError("connection reset")

    monkeypatch.setattr(files, "FIRST_PAUSE_S", 0.0)
    entry = open_dataset(str(shapes / "train")).manifest.shards[0]
    with pytest.raises(
        RuntimeError, match=r"s3://x/shard-00000\.arrow: connection reset; tried 5 times"
    ):
        Cache(str(tmp_path), 1).fetch(Gone("s3://x"), entry, as_path)


def test_a_wrong_shard_is_fetched_twice_then_named_with_its_rows(
    restored, bucket, shapes, tmp_path
):
    content = bytes(open_dataset(str(shapes / "train")).shard(2).content(1))
    whole = (shapes / "train" / SHARD).read_bytes()
    place = whole.index(content) + 40
    wrong = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    bucket[0].put_object(Bucket="data", Key=f"train/{SHARD}", Body=wrong)
    dataset = open_dataset(restored, str(tmp_path / "cache"))
    with pytest.raises(
        RuntimeError, match=r"shard-00002\.arrow \(row 1\): sha256 .* fetched 2 times"
    ):
        dataset.shard(2)
    assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 1
    [damage] = verify(restored).errors
    assert (damage.shard, damage.row) == (SHARD, 1)


def test_one_wrong_copy_is_put_aside_and_fetched_again(shapes, tmp_path):
    class OnceWrong(Files):
        calls = 0

        def copy_to(self, name, target, also):
            super().copy_to(name, target, also)
            OnceWrong.calls += 1
            if OnceWrong.calls == 1:
                also(b"noise on the line")

    manifest = open_dataset(str(shapes / "train")).manifest
    path = Cache(str(tmp_path / "cache"), 1).fetch(
        OnceWrong(str(shapes / "train")), manifest.shards[0], as_path
    )
    assert OnceWrong.calls == 2
    assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest.shards[0].sha256
    assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 1


def test_packing_to_s3_gives_the_same_manifest_and_goes_on(bucket, s3, shapes):
    out = f"s3://data/packed?{s3[1]}"
    files = [shapes / "annotations" / "instances_val.json"]
    options = PackOptions(shard_mib=64)
    packed = pack(files, str(shapes / "images" / "val"), out, options)
    assert packed.manifest.hash == open_dataset(str(shapes / "val")).manifest.hash
    assert verify(out).errors == ()
    assert pack(files, str(shapes / "images" / "val"), out, options).unchanged
    keys = [
        entry["Key"]
        for entry in bucket[0].list_objects_v2(Bucket="data", Prefix="packed")["Contents"]
    ]
    assert not [key for key in keys if ".packing" in key]


def test_datasets_of_a_bucket_join_there_as_they_do_on_this_machine(bucket, s3, shapes, tmp_path):
    out = f"s3://data/both?{s3[1]}"
    joined = join([bucket[1], str(shapes / "val")], out)
    here = join([str(shapes / "train"), str(shapes / "val")], str(tmp_path / "both"))
    assert joined.manifest == here.manifest
    assert verify(out).errors == ()


# --- the cache itself ---


def as_path(path: Path) -> Path:
    return path


def make_store(folder: Path, count: int, size: int = 1000) -> tuple[Files, list[FileEntry]]:
    folder.mkdir()
    entries = []
    for number in range(count):
        content = bytes([number]) * size
        (folder / f"{number}").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append(FileEntry(name=f"{number}", sha256=digest, bytes=size, rows=1))
    return Files(str(folder)), entries


def test_the_cache_keeps_its_size_and_drops_what_was_used_longest_ago(tmp_path):
    store, entries = make_store(tmp_path / "store", 5)
    cache = Cache(str(tmp_path / "cache"), 3000 / 2**30)
    for n in (0, 1, 2):
        os.utime(cache.fetch(store, entries[n], as_path), (n, n))
    cache.fetch(store, entries[0], as_path)  # used again
    cache.fetch(store, entries[3], as_path)
    there = [n for n in range(5) if (tmp_path / "cache" / f"{entries[n].sha256}.arrow").exists()]
    assert there == [0, 2, 3]


def test_a_file_that_is_open_survives_its_eviction(tmp_path):
    import pyarrow as pa

    store, entries = make_store(tmp_path / "store", 2)
    cache = Cache(str(tmp_path / "cache"), 1000 / 2**30)
    mapped = pa.memory_map(str(cache.fetch(store, entries[0], as_path)))
    cache.fetch(store, entries[1], as_path)
    assert not (tmp_path / "cache" / f"{entries[0].sha256}.arrow").exists()
    assert mapped.read() == bytes(1000)


def _open_at_random(folder: str, store: Files, entries: list[FileEntry], seed: int) -> None:
    chance, cache = random.Random(seed), Cache(folder, 1000 / 2**30)
    for _ in range(300):
        entry = chance.choice(entries)
        content = cache.fetch(store, entry, lambda path: path.read_bytes())
        assert hashlib.sha256(content).hexdigest() == entry.sha256


def test_nothing_is_evicted_between_its_arrival_and_its_opening(tmp_path):
    store, entries = make_store(tmp_path / "store", 6)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=_open_at_random, args=(str(tmp_path / "cache"), store, entries, seed)
        )
        for seed in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_staging_mends_a_copy_that_was_damaged_and_says_what_it_evicted(restored, tmp_path):
    cache = tmp_path / "cache"
    command = ["data", "stage", restored, "--cache", str(cache), "--json"]
    assert run_app(app, command, "maskray") == 0
    dataset = open_dataset(restored, str(cache))
    copy = cache / f"{dataset.manifest.shards[1].sha256}.arrow"
    copy.write_bytes(bytes(copy.stat().st_size))
    assert run_app(app, command, "maskray") == 0
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == dataset.manifest.shards[1].sha256
    size = sum(entry.bytes for entry in dataset.files)
    (cache / f"{'0' * 64}.arrow").write_bytes(bytes(1000))
    os.utime(cache / f"{'0' * 64}.arrow", (0, 0))
    copy.unlink()
    assert stage_datasets([open_dataset(restored, str(cache), (size + 500) / 2**30)]).evicted == 1
    with pytest.raises(
        ValueError,
        match=r"s3://data/train: .* MiB in all, the cache holds 0\.\d+ MiB; give it more",
    ):
        stage_datasets([open_dataset(restored, str(cache), (size - 1) / 2**30)])


class _Counting(Files):
    """Notes each download in a file."""

    def __reduce__(self):
        return _Counting, (self.uri,)

    def copy_to(self, name, target, also):
        with Path(f"{self.uri}-downloads").open("a") as note:
            note.write(f"{name}\n")
        super().copy_to(name, target, also)


def _fetch_all(folder: str, store: Files, entries: list[FileEntry]) -> None:
    for entry in entries:
        path = Cache(folder, 1).fetch(store, entry, as_path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256


def test_two_processes_fetch_each_file_once(tmp_path):
    _, entries = make_store(tmp_path / "store", 8, 200_000)
    store = _Counting(str(tmp_path / "store"))
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_fetch_all, args=(str(tmp_path / "cache"), store, entries))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "store-downloads").read_text().split()) == sorted(
        entry.name for entry in entries
    )


def test_what_a_crash_left_half_fetched_is_fetched_anew(tmp_path):
    store, [entry] = make_store(tmp_path / "store", 1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{entry.sha256}.part").write_bytes(b"half")
    path = Cache(str(tmp_path / "cache"), 1).fetch(store, entry, as_path)
    assert path.read_bytes() == bytes(1000)


def test_a_uri_that_cannot_be_opened_is_a_persons_error():
    with pytest.raises(ValueError, match=r"not a URI that pyarrow\.fs opens"):
        open_dataset("ftp2://host/data")
