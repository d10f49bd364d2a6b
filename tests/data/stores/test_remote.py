"""Shards on HTTP servers, good ones and bad ones, through the node's cache."""

import fcntl
import itertools
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_server import (
    FAULTS,
    SHARDS,
    Fault,
    Server,
    assert_same,
    config_for,
    garbled,
    half_that_claims_to_be_whole,
    index,
    nothing,
    serve,
    stream,
)

from convneur.data.errors import InputError
from convneur.data.format.manifest import Manifest
from convneur.data.inspect.verify import verify_dataset
from convneur.data.prepare.foreign import prepare_index
from convneur.data.stores.cache import ShardCache
from convneur.data.stores.choose import open_store
from convneur.data.stores.tar import TarStore
from convneur.data.stream.eval import EvalLoader


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
