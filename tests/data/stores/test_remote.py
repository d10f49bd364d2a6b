"""Shards on HTTP and S3 servers, good ones and bad ones, through the node's cache."""

import fcntl
import itertools
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import InputError
from convneur.data.format.manifest import Manifest
from convneur.data.inspect.verify import verify_dataset
from convneur.data.prepare.foreign import prepare_index
from convneur.data.prepare.synthetic import prepare_synthetic
from convneur.data.stores.cache import ShardCache
from convneur.data.stores.choose import open_store
from convneur.data.stores.tar import TarStore
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.train import TrainLoader

Fault = Callable[["Handler", bytes], None]
SHARDS = 8


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; counts what it is asked for, and does what a test wants done instead."""

    asked: Counter[str]
    faults: dict[str, Iterator[Fault | None]]

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.asked[name] += 1
        fault = next(self.faults.get(name, iter(())), None)
        path = Path(self.directory) / name
        if fault is None or not path.exists():
            super().do_GET()
        else:
            fault(self, path.read_bytes())

    def log_message(self, *_: object) -> None:
        pass

    def start(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def answer_503(handler: Handler, content: bytes) -> None:
    handler.send_error(503)


def drop(handler: Handler, content: bytes) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def half(handler: Handler, content: bytes) -> None:
    handler.start(len(content))
    handler.wfile.write(content[: len(content) // 2])


def half_that_claims_to_be_whole(handler: Handler, content: bytes) -> None:
    handler.start(len(content) // 2)
    handler.wfile.write(content[: len(content) // 2])


def nothing(handler: Handler, content: bytes) -> None:
    handler.start(0)


def garbled(handler: Handler, content: bytes) -> None:
    handler.start(len(content))
    handler.wfile.write(content[:5000] + b"!" + content[5001:])


def silence(handler: Handler, content: bytes) -> None:
    handler.start(len(content))
    time.sleep(0.6)


FAULTS = [answer_503, drop, half, half_that_claims_to_be_whole, nothing, garbled, silence]


class Server:
    def __init__(self, folder: Path):
        self.asked: Counter[str] = Counter()
        self.faults: dict[str, Iterator[Fault | None]] = {}
        kind = type("_Handler", (Handler,), {"asked": self.asked, "faults": self.faults})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: kind(*args, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of eight small JPEGs to train on, one of six to evaluate on."""
    folder = tmp_path_factory.mktemp("origin") / "data"
    prepare_synthetic(folder, classes=4, images=64, height=40, width=50, processes=1, shard_samples=8)
    return folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convneur.data.stores.retry.DELAYS", (0.01, 0.01, 0.01))
    monkeypatch.setattr("convneur.data.stores.remote.STALL_SECONDS", 10)  # a busy machine's server isn't silent


@pytest.fixture(autouse=True)
def noticing_silence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "fault" in request.fixturenames and request.getfixturevalue("fault") is silence:
        request.getfixturevalue("impatient")
        monkeypatch.setattr("convneur.data.stores.remote.STALL_SECONDS", 0.3)


@pytest.fixture
def server(origin: Path, impatient: None) -> Iterator[Server]:
    with serve(origin) as server:
        yield server


def config_for(folder: Path, cache: Path, **changes: object) -> DataConfig:
    base = DataConfig(
        root=str(folder),
        image_size=16,
        interpolation="bilinear",
        global_batch_size=16,
        lanes=4,
        window=1,
        workers=0,
        eval_batch_size=3,
        cache_dir=str(cache),
        augment=AugmentConfig(randaugment="", mixup=0, cutmix=0),
    )
    return replace(base, **changes)


def index(server: Server, out: Path, *splits: str) -> None:
    for split in splits or ("train",):
        last = SHARDS - 1 if split == "train" else 0
        prepare_index(f"{server.url}/{split}-{{000000..{last:06d}}}.tar", out, split=split, processes=2)
    server.asked.clear()


def stream(config: DataConfig, stop: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    store = open_store(config, "train")
    loader = TrainLoader(config, store, seed=0, rank=0, world_size=1, accumulation=1)
    return [(batch.indices, batch.images) for (batch,) in loader.iterate(0, stop)]


def assert_same(
    ours: list[tuple[torch.Tensor, torch.Tensor]], expected: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_that_of_local_shards(origin: Path, server: Server, tmp_path: Path, workers: int) -> None:
    index(server, tmp_path / "index", "train", "val")
    expected = stream(config_for(origin, tmp_path / "unused"))
    config = config_for(tmp_path / "index", tmp_path / "cache", workers=workers)
    assert_same(stream(config), expected)
    assert not (tmp_path / "unused").exists()
    assert all(server.asked[f"train-{number:06d}.tar"] <= 1 for number in range(SHARDS))
    store = open_store(config, "val")
    assert sum(int(batch.mask.sum()) for batch in EvalLoader(config, store, rank=0, world_size=1)) == len(store) == 6
    fetched = dict(server.asked)
    assert_same(stream(config), expected)  # all from the cache
    assert dict(server.asked) == fetched
    assert [finding.denied for finding in verify_dataset(tmp_path / "index", 2)] == [(), ()]


def test_verify_fetches_again_what_was_garbled_on_its_way(server: Server, tmp_path: Path) -> None:
    index(server, tmp_path / "index")
    for number in range(SHARDS):
        server.faults[f"train-{number:06d}.tar"] = iter([garbled])
    (found,) = verify_dataset(tmp_path / "index", 2)
    assert (found.denied, found.shards) == ((), ())
    assert set(server.asked.values()) == {2}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_recovers_goes_unnoticed(origin: Path, server: Server, tmp_path: Path, fault: Fault) -> None:
    index(server, tmp_path / "index")
    for number in range(SHARDS):
        server.faults[f"train-{number:06d}.tar"] = iter([fault, fault])
    ours = stream(config_for(tmp_path / "index", tmp_path / "cache", lanes=1), 2)
    assert_same(ours, stream(config_for(origin, tmp_path / "unused", lanes=1), 2))
    assert max(server.asked.values()) == 3
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_stays_bad_ends_in_one_line(server: Server, tmp_path: Path, fault: Fault, workers: int) -> None:
    index(server, tmp_path / "index")
    server.faults["train-000005.tar"] = itertools.repeat(fault)
    with pytest.raises(
        InputError, match=r"^http://.*/train-000005.tar can't be read \(.*\), and 4 attempts.*$"
    ) as caught:
        stream(config_for(tmp_path / "index", tmp_path / "cache", workers=workers))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_and_a_server_that_is_gone(origin: Path, tmp_path: Path, impatient: None) -> None:
    folder = Path(shutil.copytree(origin, tmp_path / "origin"))
    with serve(folder) as server:
        index(server, tmp_path / "index")
        (folder / "train-000003.tar").unlink()
        with pytest.raises(InputError, match=r"^http://.*/train-000003.tar can't be read \(status 404 .*$"):
            stream(config_for(tmp_path / "index", tmp_path / "cache"))
        assert server.asked["train-000003.tar"] <= 2  # the reader and the one that fetches ahead: asking again is vain
    with pytest.raises(InputError, match=r"^http://.*can't be read \(.*refused.*$"):
        stream(config_for(tmp_path / "index", tmp_path / "cache2"))


@pytest.mark.parametrize("fault", [half_that_claims_to_be_whole, garbled, nothing])
def test_indexing_notices_what_is_not_whole(server: Server, tmp_path: Path, fault: Fault) -> None:
    server.faults["train-000001.tar"] = itertools.repeat(fault)
    if fault is garbled:  # without a checksum to compare with, bytes that change within an image are an image
        return
    with pytest.raises(InputError, match=r"^http://.*/train-000001.tar can't be read \(.*not a whole WebDataset shard"):
        prepare_index(f"{server.url}/train-00000{{0..2}}.tar", tmp_path / "index", split="train", processes=2)
    assert not (tmp_path / "index" / "manifest.json").exists()


def cached_bytes(cache: Path) -> int:
    """What the shards in a cache take. Nobody makes room meanwhile; a shard that gets its final name counts once."""
    sizes = {}
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in [*cache.glob("*.part"), *cache.glob("*.tar")]:
            with suppress(FileNotFoundError):
                sizes[path.stem] = path.stat().st_size
    return sum(sizes.values())


def _read_all(store: TarStore, order: list[int], results: object) -> None:
    for number in order:
        sample = store.read(number)
        results.put((number, sample.key))


def test_several_ranks_share_a_cache_without_fetching_twice(server: Server, tmp_path: Path) -> None:
    index(server, tmp_path / "index")
    config = config_for(tmp_path / "index", tmp_path / "cache")
    context = get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=_read_all, args=(open_store(config, "train"), list(range(64)), results))
        for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    seen = Counter(results.get(timeout=1200) for _ in range(4 * 64))
    for rank in ranks:
        rank.join()
    assert len(seen) == 64
    assert set(seen.values()) == {4}
    assert server.asked == {f"train-{number:06d}.tar": 1 for number in range(SHARDS)}


def test_prefetching_ends_in_a_process_that_handles_term(server: Server, tmp_path: Path) -> None:
    """As training does: what it forks inherits the handler, so TERM doesn't end it."""
    index(server, tmp_path / "index")
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        stream(config_for(tmp_path / "index", tmp_path / "cache"), stop=2)  # it would hang
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_the_budget_is_kept_while_ranks_compete(server: Server, tmp_path: Path) -> None:
    index(server, tmp_path / "index")
    largest = max(shard.size for shard in Manifest.read(tmp_path / "index").splits["train"].shards)
    budget = int(2.5 * largest)
    config = config_for(tmp_path / "index", tmp_path / "cache", cache_gb=budget / 1e9)
    context = get_context("fork")
    results = context.Queue()
    orders = [np.random.default_rng(rank).permutation(64).tolist() for rank in range(3)]
    ranks = [context.Process(target=_read_all, args=(open_store(config, "train"), order, results)) for order in orders]
    for rank in ranks:
        rank.start()
    most, seen = 0, Counter[tuple[int, str]]()
    while sum(seen.values()) < 3 * 64:
        most = max(most, cached_bytes(tmp_path / "cache"))
        seen[results.get(timeout=1200)] += 1
    for rank in ranks:
        rank.join()
    assert set(seen.values()) == {3}
    assert largest < most <= budget
    assert sum(server.asked.values()) > SHARDS  # some were evicted and fetched again


def test_the_shards_read_last_are_kept(server: Server, tmp_path: Path) -> None:
    index(server, tmp_path / "index")
    largest = max(shard.size for shard in Manifest.read(tmp_path / "index").splits["train"].shards)
    store = open_store(config_for(tmp_path / "index", tmp_path / "cache", cache_gb=2.2 * largest / 1e9), "train")
    for shard in (0, 1, 0, 2, 0, 3, 0):
        store.read(shard * 8)
        time.sleep(0.05)  # more than a tick of any file system's clock
    assert server.asked["train-000000.tar"] == 1


def test_a_budget_below_a_shard_is_one_line(server: Server, tmp_path: Path) -> None:
    index(server, tmp_path / "index")
    with pytest.raises(InputError, match=r"^data.cache_gb is 1e-06, but http://.* raise it$"):
        stream(config_for(tmp_path / "index", tmp_path / "cache", cache_gb=1e-6))


def test_damage_in_the_cache_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    index(server, tmp_path / "index")
    store = open_store(config_for(tmp_path / "index", tmp_path / "cache"), "train")
    expected = store.read(0)
    (cached,) = (tmp_path / "cache").glob("*.tar")
    cached.write_bytes(cached.read_bytes().replace(b"JFIF", b"JFIf"))
    assert store.read(0) == expected
    assert server.asked["train-000000.tar"] == 2


def test_what_a_killed_process_left_is_cleared_away(server: Server, tmp_path: Path) -> None:
    index(server, tmp_path / "index")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "0123.part").write_bytes(bytes(10**6))
    open_store(config_for(tmp_path / "index", cache, cache_gb=0.001), "train").read(0)
    assert not list(cache.glob("*.part"))


def test_without_a_cache_remote_shards_are_refused(server: Server, tmp_path: Path) -> None:
    index(server, tmp_path / "index")
    with pytest.raises(InputError, match="shards on servers"):
        TarStore(tmp_path / "index", "train")


@pytest.fixture(scope="module")
def bucket(origin: Path) -> Iterator[str]:
    """A bucket with the shards on moto's S3 server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for path in origin.glob("*.tar"):
            client.upload_file(str(path), "shards", f"small/{path.name}")
        yield "s3://shards/small"
        server.stop()


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{000000..000007}.tar"])
def test_s3_gives_the_stream_of_local_shards(origin: Path, bucket: str, tmp_path: Path, pattern: str) -> None:
    assert prepare_index(f"{bucket}/{pattern}", tmp_path / "index", split="train", processes=2) == 64
    ours = stream(config_for(tmp_path / "index", tmp_path / "cache", workers=2))
    assert_same(ours, stream(config_for(origin, tmp_path / "unused")))


def test_keys_in_a_bucket_may_have_any_characters(origin: Path, bucket: str, tmp_path: Path) -> None:
    import boto3

    odd = "run #1/q[1] a+b%20c?ä/"
    for number in (0, 1):
        shard = f"train-00000{number}.tar"
        boto3.client("s3").upload_file(str(origin / shard), "shards", odd + shard)
    local = TarStore(origin, "train")
    for number, pattern in enumerate(("train-*.tar", "train-00000?.tar", "train-{000000..000001}.tar")):
        out = tmp_path / str(number)
        assert prepare_index(f"s3://shards/{odd}{pattern}", out, split="train", processes=1) == 16
        remote = open_store(config_for(out, tmp_path / "cache"), "train")
        assert [remote.read(sample) for sample in (0, 15)] == [local.read(sample) for sample in (0, 15)]


def test_s3_failures_are_one_line(
    bucket: str, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_index(f"{bucket}/train-*.tar", tmp_path / "index", split="train", processes=1)
    for pattern, expected in (
        (f"{bucket}/absent-*.tar", "there is no such shard"),
        (f"{bucket}/absent.tar", r"status 404 NoSuchKey"),
        ("s3://absent/x.tar", r"status 404 NoSuchBucket"),
        ("ftp://host/x.tar", r"expected http://, https:// or s3://"),
        ("http://host/*.tar", r"write numbers as"),
        (str(tmp_path / "absent*.tar"), "there is no such shard"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            prepare_index(pattern, tmp_path / "other", split="train", processes=1)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"^s3://.* can't be read \(Could not connect.*and 4 attempts.*$"):
        stream(config_for(tmp_path / "index", tmp_path / "cache"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_of_faults_gives_the_right_bytes_or_an_error(
    server: Server, origin: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    shard = Manifest.read(origin).splits["train"].shards[0]
    faults = data.draw(st.lists(st.sampled_from([None, *FAULTS[:-1]]), max_size=6))
    server.faults[shard.name] = iter(faults)
    cache = ShardCache(folder, budget=10**9)
    remote = replace(shard, name=f"{server.url}/{shard.name}")
    if all(faults[:4]) and len(faults) >= 4:
        with pytest.raises(InputError):
            cache.read(remote, shard.size, 0)
        assert not list(folder.glob("*.part")) + list(folder.glob("*.tar"))
    else:
        assert cache.read(remote, shard.size, 0) == (origin / shard.name).read_bytes()
