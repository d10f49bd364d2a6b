"""Files, or parts of them, from HTTP(S) servers and S3 buckets: within bounded time and size, or not at all."""

import gzip
import http.client
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import IO, Any, BinaryIO, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urldefrag, urlsplit

import google_crc32c

from convneur.data.errors import InputError
from convneur.data.stores.addresses import SIGNED_URLS, full, public, redact, request

STALL_SECONDS = 60
"""How long a server may say nothing."""
ATTEMPT_SECONDS = 1800
"""How long one attempt at a file may take, so that a trickle ends as well."""
BLOCK = 1 << 20
PASSING_STATUS = frozenset({408, 425, 429})  # of the 4xx ones; 5xx may always pass


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""


def download(url: str, file: BinaryIO, size: int | None = None) -> tuple[int, int]:
    """Copies what a URL holds to `file`, once.

    Args:
        url: its public form will do, see `convneur.data.stores.addresses`.
        file: where to.
        size: bytes that the original has; None if nobody knows. No more than these are copied.

    Returns:
        Bytes and CRC-32C of what arrived: shorter than the original where a server closes the connection early, and
        one byte longer than `size` where it would go on.

    Raises:
        OSError: the server can't be reached, answers with an error that may pass, or stops answering.
        InputError: it will not give it, or the kind of URL isn't supported.
    """
    copied = checksum = 0
    deadline = time.monotonic() + ATTEMPT_SECONDS
    with _open(url) as (stream, _):
        while block := stream.read(BLOCK if size is None else min(BLOCK, size - copied + 1)):
            copied, checksum = copied + len(block), google_crc32c.extend(checksum, block)
            if size is not None and copied > size:
                break
            file.write(block)
            if time.monotonic() > deadline:
                raise TimeoutError(f"only {copied} bytes in {ATTEMPT_SECONDS} s")
    return copied, checksum


def read_range(url: str, size: int, offset: int) -> bytes:
    """Reads a part of what a URL holds, whether the server knows of ranges or begins at the first byte.

    Returns:
        `size` bytes from `offset` on.

    Raises:
        OSError: as in `download`, or the part doesn't arrive whole.
        InputError: as in `download`.
    """
    deadline = time.monotonic() + ATTEMPT_SECONDS
    parts: list[bytes] = []
    with _open(url, (offset, offset + size - 1)) as (stream, position):
        while position < offset + size and (block := stream.read(min(BLOCK, offset + size - position))):
            parts.append(block[max(offset - position, 0) :])
            position += len(block)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not at byte {offset + size} after {ATTEMPT_SECONDS} s")
    if position != offset + size:
        raise OSError(f"{size} bytes from {offset} on were asked for, and they end at {position}")
    return b"".join(parts)


def list_bucket(prefix: str) -> list[str]:
    """URLs of the objects whose own URL begins with `prefix`, s3://BUCKET/..., sorted."""
    bucket, start = _bucket_and_key(prefix)
    with _s3_errors(prefix):
        pages = _s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start)
        return sorted(f"s3://{bucket}/{entry['Key']}" for page in pages for entry in page.get("Contents", ()))


@contextmanager
def _open(url: str, part: tuple[int, int] | None = None) -> Iterator[tuple[_Stream, int]]:
    """What a URL holds, or its bytes from the first to the last of `part`; and the number of the first that comes.

    That is 0 where a server doesn't know of parts. Parts of a compressed answer would be parts of what is compressed.
    """
    scheme = url.partition("://")[0].lower()
    wanted = f"bytes={part[0]}-{part[1]}" if part else ""
    if scheme not in ("http", "https", "s3"):
        raise InputError(f"{public(url)} can't be read: expected http://, https:// or s3://")
    with _s3(url, wanted) if scheme == "s3" else _http(url, wanted) as (stream, coding, answered):
        if not wanted or not answered:
            yield _decoded(stream, coding), 0
            return
        if not coding:
            unit, _, numbers = answered.partition(" ")
            first = numbers.partition("-")[0]
            if unit != "bytes" or not first.isdecimal() or int(first) > part[0]:  # type: ignore[index]
                raise OSError("the server answers with another part than was asked for")
            yield stream, int(first)
            return
    with _open(url) as whole:
        yield whole


def _decoded(stream: _Stream, coding: str) -> _Stream:
    if not coding:
        return stream
    if coding not in ("gzip", "x-gzip"):
        raise OSError(f"the server answers in the coding {coding[:20]!r}, which wasn't asked for")
    return _Unzipped(stream)


class _Unzipped:
    def __init__(self, stream: _Stream):
        source: Any = stream  # it needs no more than `read`
        self._file = gzip.GzipFile(fileobj=source, mode="rb")

    def read(self, size: int, /) -> bytes:
        try:
            return self._file.read1(size)
        except (EOFError, zlib.error) as error:
            raise OSError(str(error)) from None


@contextmanager
def _http(url: str, wanted: str) -> Iterator[tuple[_Stream, str, str]]:
    """The body, its content coding, and which part of the whole it is: empty where it is the whole."""
    asked = request(full(url))
    if wanted:
        asked.add_header("Range", wanted)
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _Redirects,
    ):
        opener.add_handler(handler())
    try:
        with closing(opener.open(asked, timeout=STALL_SECONDS)) as response:
            partial = response.headers.get("Content-Range", "") if response.status == 206 else ""
            yield _Http(response), _coding(response.headers.get("Content-Encoding")), partial
    except HTTPError as error:
        with error:
            _refuse(url, error.code, error.reason)
            raise OSError(f"HTTP status {error.code} {_one_line(error.reason)}") from None
    except URLError as error:
        raise OSError(_one_line(error.reason)) from None
    except http.client.HTTPException as error:
        raise OSError(_one_line(repr(error))) from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to HTTP(S) servers; a password goes to the server that it was given for, not to others."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        followed = super().redirect_request(req, fp, code, msg, headers, newurl)
        if followed is None:
            return None
        there = request(urldefrag(newurl).url)
        for name, value in req.headers.items():
            there.add_header(name, value)
        here, login = urlsplit(req.full_url), req.unredirected_hdrs.get("Authorization")
        onward = urlsplit(there.full_url)
        if login and (here.hostname, here.port) == (onward.hostname, onward.port) and here.scheme == onward.scheme:
            there.unredirected_hdrs.setdefault("Authorization", login)
        return there


class _Http:
    def __init__(self, response: http.client.HTTPResponse):
        self._response = response

    def read(self, size: int = -1, /) -> bytes:
        return self._response.read1(size)  # what there is: `read` would wait for all of it


@contextmanager
def _s3(url: str, wanted: str) -> Iterator[tuple[_Stream, str, str]]:
    """As `_http`."""
    bucket, key = _bucket_and_key(url)
    with _s3_errors(url):
        answer = _s3_client().get_object(Bucket=bucket, Key=key, **({"Range": wanted} if wanted else {}))
        with closing(answer["Body"]) as body:
            yield body, _coding(answer.get("ContentEncoding")), answer.get("ContentRange", "") if wanted else ""


def _coding(name: str | None) -> str:
    coding = (name or "").strip().lower()
    # S3's own clients leave "aws-chunked" behind, which is of the upload alone.
    return "" if coding in ("identity", "aws-chunked") else coding


def _bucket_and_key(url: str) -> tuple[str, str]:
    """A key is all that follows the bucket: none of its characters means anything."""
    bucket, _, key = url.partition("://")[2].partition("/")
    if "@" in bucket or ":" in bucket:
        raise InputError(
            "an s3:// address begins with its bucket, s3://BUCKET/KEY: keys come from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_PROFILE) or ~/.aws"
        )
    return bucket, key


def _refuse(url: str, status: int, reason: str) -> None:
    if 400 <= status < 500 and status not in PASSING_STATUS:
        remedy = "check the address and the access rights"
        if status in (401, 403) and not url.startswith("s3:"):
            remedy += f"; a password belongs into ~/.netrc, signed addresses into a file that {SIGNED_URLS} names"
        raise InputError(f"{public(url)} can't be read (status {status} {_one_line(reason)}): {remedy}")


def _one_line(reason: object) -> str:
    return redact(" ".join(str(reason).split()))


def _s3_client() -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise InputError("s3:// needs the package boto3: pip install 'convneur[s3]'") from None
    patience = {"connect_timeout": STALL_SECONDS, "read_timeout": STALL_SECONDS}
    return boto3.client("s3", config=Config(**patience, retries={"total_max_attempts": 1}))


@contextmanager
def _s3_errors(url: str) -> Iterator[None]:
    """botocore's exceptions as those of `download`."""
    client_error, any_error = _s3_exceptions()
    try:
        yield
    except client_error as error:
        response = error.response
        status, reason = response["ResponseMetadata"].get("HTTPStatusCode", 0), response["Error"].get("Code", "")
        _refuse(url, status, reason)
        raise OSError(f"status {status} {_one_line(reason)}") from None
    except any_error as error:
        raise OSError(_one_line(error)) from None


def _s3_exceptions() -> Any:
    try:
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    except ImportError:
        return (), ()
    return ClientError, (BotoCoreError, HTTPClientError)
