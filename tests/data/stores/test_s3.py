"""Shards in S3 buckets, through the node's cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_server import assert_same, config_for, stream

from convneur.data.errors import InputError
from convneur.data.prepare.foreign import prepare_index
from convneur.data.stores.choose import open_store
from convneur.data.stores.tar import TarStore


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
