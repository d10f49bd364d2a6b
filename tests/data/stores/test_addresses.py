"""Addresses of shards: which bytes they stand for, and that nothing of them that grants access is shown or kept."""

import base64
import gzip
import http.server
import io
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import pytest

from convneur.data.config import DataConfig
from convneur.data.errors import InputError
from convneur.data.format.manifest import Manifest
from convneur.data.prepare.foreign import expand, prepare_index
from convneur.data.prepare.synthetic import prepare_synthetic
from convneur.data.stores.addresses import SIGNED_URLS, public, redact
from convneur.data.stores.choose import open_store
from convneur.data.stores.remote import _bucket_and_key, download, read_range
from convneur.data.stores.tar import TarStore

SECRET = "s3cr3tS3cr3tS3cr3t"
CONTENT = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a path with what `answers` has for it; "login", "sign" and "hop" ask for more first."""

    answers: dict[str, bytes]
    authorized: list[str | None]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.authorized.append(self.headers["Authorization"])
        expected = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()
        if path.startswith("/hop/"):
            return self.answer(302, b"", Location=unquote(query))
        if (path.startswith("/login/") and self.headers["Authorization"] != expected) or (
            path.startswith("/sign/") and query != f"X-Amz-Signature={SECRET}"
        ):
            return self.answer(403, b"")
        content = self.answers.get(unquote(path).rpartition("/")[2])
        if content is None:
            return self.answer(404, b"")
        if path.startswith("/zip/"):
            return self.answer(200, gzip.compress(content), **{"Content-Encoding": "gzip"})
        if path.startswith("/endless/"):
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(content)
            return None
        first, _, last = (self.headers["Range"] or "").removeprefix("bytes=").partition("-")
        if path.startswith("/ranges/") and first:
            part = content[int(first) : int(last) + 1]
            return self.answer(206, part, **{"Content-Range": f"bytes {first}-{last}/{len(content)}"})
        if path.startswith("/short/") and first:
            return self.answer(206, content[int(first) : int(last)], **{"Content-Range": f"bytes {first}-{last}/9"})
        if path.startswith("/other/") and first:
            return self.answer(206, content[-5:], **{"Content-Range": "bytes 9999-10003/10240"})
        return self.answer(200, content)

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        with suppress(ConnectionError):  # who has enough goes away
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("convneur.data.stores.retry.DELAYS", (0.0,))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv(SIGNED_URLS, raising=False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin") / "data"
    prepare_synthetic(folder, classes=2, images=8, height=20, width=20, processes=1, shard_samples=4)
    return folder


@pytest.fixture(scope="module")
def server(dataset: Path) -> Iterator[type[Handler]]:
    shards = {path.name: path.read_bytes() for path in dataset.glob("*.tar")}
    answers = {"x.tar": CONTENT, "ä #+%, [1].tar": CONTENT, **shards}
    kind = type("_Handler", (Handler,), {"answers": answers, "authorized": []})
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    kind.url = f"http://127.0.0.1:{http_server.server_port}"
    threading.Thread(target=http_server.serve_forever, args=(0.05,), daemon=True).start()
    yield kind
    http_server.shutdown()
    http_server.server_close()


def fetched(url: str, size: int | None = None) -> bytes:
    file = io.BytesIO()
    download(url, file, size)
    return file.getvalue()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:pass@host:8080/a.tar", "https://host:8080/a.tar"),
        ("https://token@host/a.tar", "https://host/a.tar"),
        ("https://[::1]:80/a.tar", "https://[::1]:80/a.tar"),
        ("https://host/a.tar?X-Amz-Signature=1&X-Amz-Date=2", "https://host/a.tar"),
        ("https://host/a.tar?sv=2022&sig=abc", "https://host/a.tar"),
        ("https://host/a.tar?download=true", "https://host/a.tar?download=true"),
        ("https://host/get?file=train-000001.tar", "https://host/get?file=train-000001.tar"),
        ("https://host/get?e=0f5a9b1c2d3e4f506172", "https://host/get"),
        ("https://host/get?0f5a9b1c2d3e4f506172", "https://host/get"),
        ("https://host/@v1/a.tar", "https://host/@v1/a.tar"),
        ("s3://AKIA:a/b@bucket/x.tar", "s3://***"),
        ("https://user:p/w@host/a.tar", "https://***"),
        ("s3://bucket/a@b?c#d.tar", "s3://bucket/a@b?c#d.tar"),
        ("/data/a?b.tar", "/data/a?b.tar"),
    ],
)
def test_what_grants_access_is_no_part_of_the_public_address(address: str, shown: str) -> None:
    assert public(address) == public(shown) == shown


def test_messages_of_libraries_are_cleared_of_secrets() -> None:
    text = redact(f'for url: "/a.tar?Signature={SECRET}" (proxy http://me:{SECRET}@proxy:80/, see https://h/?page=2)')
    assert redact(f"s3://AKIA:x/{SECRET}@bucket/a can't be read") == "s3://***@bucket/a can't be read"
    for kept in ("http://h:80/a@b.tar can't", "http://[::1]:80/@/x", "s3://bucket/a@b is", "/a?b"):
        assert redact(kept) == kept
    assert text == 'for url: "/a.tar?***" (proxy http://***@proxy:80/, see https://h/?page=2)'


@pytest.mark.parametrize("name", ["ä #+%, [1].tar", "%C3%A4%20%23+%25,%20%5B1%5D.tar"])
def test_characters_of_an_address_are_those_of_the_name(server: type[Handler], name: str) -> None:
    (url,) = expand(f"{server.url}/a b/{name}")
    assert fetched(url) == CONTENT


@pytest.mark.parametrize(
    "url", ["http://user:p/w@h/x", "http://h:port/x", "http:///x", "http://[::1/x", "http://a b/x"]
)
def test_what_is_no_address_is_one_line_without_it(url: str) -> None:
    with pytest.raises(InputError, match="expected http://HOST") as caught:
        fetched(url)
    assert "w@" not in str(caught.value)


def test_a_password_reaches_the_server_it_is_for_and_no_other(server: type[Handler], tmp_path: Path) -> None:
    place = server.url.removeprefix("http://")
    with pytest.raises(InputError, match=r"^http://127\.0\.0\.1:\d+/login/x.tar can't be read \(status 403.*netrc"):
        fetched(f"{server.url}/login/x.tar")
    assert fetched(f"http://user:{SECRET}@{place}/login/x.tar") == CONTENT
    assert fetched(f"http://user:{SECRET}@{place}/hop/?/login/x.tar") == CONTENT  # a redirect on the same server
    server.authorized.clear()
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    assert fetched(f"http://user:{SECRET}@{place}/hop/?{elsewhere}/x.tar%23part") == CONTENT
    assert server.authorized[1] is None
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    assert fetched(f"{server.url}/login/x.tar") == CONTENT


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1:9/x"])
def test_redirects_lead_to_web_servers_alone(server: type[Handler], target: str) -> None:
    with pytest.raises(OSError, match=r"not allowed|unknown url type"):
        fetched(f"{server.url}/hop/?{target}")


def test_a_signed_shard_is_indexed_and_read_without_keeping_the_signature(
    server: type[Handler], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "index"
    pattern = f"{server.url}/sign/train-00000{{0..1}}.tar?X-Amz-Signature={SECRET}"
    prepare_index(pattern, out, split="train", processes=1)
    assert not [path for path in out.rglob("*") if SECRET.encode() in path.read_bytes()]
    names = [shard.name for shard in Manifest.read(out).splits["train"].shards]
    assert names == [f"{server.url}/sign/train-00000{number}.tar" for number in (0, 1)]
    config = DataConfig(root=str(out), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=rf"status 403 .*{SIGNED_URLS}") as caught:
        open_store(config, "train").read(0)
    assert SECRET not in str(caught.value)
    (tmp_path / "signed").write_text(f"\n{pattern}\n")
    monkeypatch.setenv(SIGNED_URLS, str(tmp_path / "signed"))
    assert open_store(config, "train").read(5) == TarStore(dataset, "train").read(5)
    assert SECRET not in "".join(capfd.readouterr())
    monkeypatch.setenv(SIGNED_URLS, str(tmp_path / "absent"))
    with pytest.raises(InputError, match=rf"^{SIGNED_URLS}: .*absent can't be read \(No such file"):
        fetched(names[0])


def test_addresses_that_only_differ_in_what_is_not_kept_are_refused(server: type[Handler], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stands for several shards"):
        prepare_index(f"{server.url}/get?token={{1,2}}", tmp_path / "index", split="train", processes=1)
    assert not (tmp_path / "index").exists()


def test_a_download_stops_at_the_known_size(server: type[Handler]) -> None:
    file = io.BytesIO()
    assert download(f"{server.url}/endless/x.tar", file, 10_000)[0] == 10_001
    assert len(file.getvalue()) <= 10_000


def test_a_compressed_answer_is_what_was_compressed(server: type[Handler]) -> None:
    assert fetched(f"{server.url}/zip/x.tar") == CONTENT
    assert read_range(f"{server.url}/zip/x.tar", 50, 1000) == CONTENT[1000:1050]


@pytest.mark.parametrize("folder", ["ranges", "whole", "endless"])
def test_a_part_is_read_whether_the_server_knows_of_parts(server: type[Handler], folder: str) -> None:
    assert read_range(f"{server.url}/{folder}/x.tar", 50, 1000) == CONTENT[1000:1050]


@pytest.mark.parametrize(("folder", "offset"), [("short", 0), ("other", 0), ("whole", len(CONTENT) - 49)])
def test_a_part_that_is_not_there_is_an_error(server: type[Handler], folder: str, offset: int) -> None:
    with pytest.raises(OSError, match=r"asked for"):
        read_range(f"{server.url}/{folder}/x.tar", 50, offset)


def test_a_path_that_exists_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("q[1]", "q1", "a{b,c}", "what?", "s*r"):
        Path(folder).mkdir()
        for number in (0, 1):
            Path(folder, f"t{number}.tar").touch()
    Path("q1/[x].tar").touch()

    def names(pattern: str) -> list[str]:
        return [os.path.relpath(name) for name in expand(pattern)]

    assert names("q[1]/t0.tar") == ["q[1]/t0.tar"]
    assert names("q[1]/t*.tar") == ["q[1]/t0.tar", "q[1]/t1.tar"]
    assert names("q[1]/t{0..1}.tar") == ["q[1]/t0.tar", "q[1]/t1.tar"]
    assert names("a{b,c}/t[0-9].tar") == ["a{b,c}/t0.tar", "a{b,c}/t1.tar"]
    assert names("what?/*") == ["what?/t0.tar", "what?/t1.tar"]
    assert names(str(tmp_path / "s*r/t1.tar")) == ["s*r/t1.tar"]
    assert names("q1/[x]*") == ["q1/[x].tar"]
    with pytest.raises(InputError, match="there is no such shard"):
        names("q1/[y]*")


def test_a_key_in_a_bucket_is_all_that_follows_the_bucket() -> None:
    for key in ("run #1/a?b%20+ä.tar", "/a", "a//b", "x@y:z"):
        assert _bucket_and_key(f"s3://bucket/{key}") == ("bucket", key)
    with pytest.raises(InputError, match="AWS_ACCESS_KEY_ID") as caught:
        _bucket_and_key(f"s3://AKIA:{SECRET}@bucket/x.tar")
    assert SECRET not in str(caught.value)
