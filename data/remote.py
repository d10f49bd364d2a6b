"""Whole files from HTTP(S) servers and S3 buckets: checked, within bounded time, or not at all."""

import http.client
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, BinaryIO, Protocol
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import google_crc32c

from convneur.data.errors import InputError

STALL_SECONDS = 60
"""How long a server may say nothing."""
ATTEMPT_SECONDS = 1800
"""How long one attempt at a file may take, so that a trickle ends as well."""
BLOCK = 1 << 20
PASSING_STATUS = frozenset({408, 425, 429})  # of the 4xx ones; 5xx may always pass


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL."""
    return "://" in name


def download(url: str, file: BinaryIO) -> tuple[int, int]:
    """Copy what a URL holds to `file`, once.

    Returns:
        Bytes and CRC-32C of what arrived: shorter than the original where a server closes the connection early.

    Raises:
        OSError: the server can't be reached, answers with an error that may pass, or stops answering.
        InputError: it will not give it, or the kind of URL isn't supported.
    """
    size = checksum = 0
    deadline = time.monotonic() + ATTEMPT_SECONDS
    with _open(url) as stream:
        while block := stream.read(BLOCK):
            file.write(block)
            size, checksum = size + len(block), google_crc32c.extend(checksum, block)
            if time.monotonic() > deadline:
                raise TimeoutError(f"only {size} bytes in {ATTEMPT_SECONDS} s")
    return size, checksum


def list_bucket(prefix: str) -> list[str]:
    """URLs of the objects whose own URL begins with `prefix`, s3://BUCKET/..., sorted."""
    bucket, start = urlsplit(prefix).netloc, urlsplit(prefix).path.lstrip("/")
    with _s3_errors(prefix):
        pages = _s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start)
        return sorted(f"s3://{bucket}/{entry['Key']}" for page in pages for entry in page.get("Contents", ()))


@contextmanager
def _open(url: str) -> Iterator[_Stream]:
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        try:
            with urlopen(url, timeout=STALL_SECONDS) as response:
                yield _Http(response)
        except HTTPError as error:
            _refuse(url, error.code, error.reason)
            raise OSError(f"HTTP status {error.code} {error.reason}") from None
        except http.client.HTTPException as error:
            raise OSError(repr(error)) from None
    elif scheme == "s3":
        with _s3_errors(url):
            body = _s3_client().get_object(Bucket=urlsplit(url).netloc, Key=urlsplit(url).path.lstrip("/"))["Body"]
            with closing(body):
                yield body
    else:
        raise InputError(f"{url} can't be read: expected http://, https:// or s3://")


class _Http:
    def __init__(self, response: http.client.HTTPResponse):
        self._response = response

    def read(self, size: int, /) -> bytes:
        return self._response.read1(size)  # what there is: `read` would wait for all of it


def _refuse(url: str, status: int, reason: str) -> None:
    if 400 <= status < 500 and status not in PASSING_STATUS:
        raise InputError(f"{url} can't be read (status {status} {reason}): check the address and the access rights")


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
        raise OSError(f"status {status} {reason}") from None
    except any_error as error:
        raise OSError(" ".join(str(error).split())) from None


def _s3_exceptions() -> Any:
    try:
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
    except ImportError:
        return (), ()
    return ClientError, (BotoCoreError, HTTPClientError)
