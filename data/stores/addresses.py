"""Addresses of shards on servers: what is asked for, and what of an address may be shown and kept.

What grants access (user and password, a signed query) is neither shown nor written down. `public` is the address
without it, the name that a shard goes by. When the shard is fetched, `full` and `request` look the rest up: in the file
that the environment variable `SIGNED_URLS` names, or in ~/.netrc.
"""

import base64
import netrc
import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import Request

from braceexpand import braceexpand

from convneur.data.errors import InputError

SIGNED_URLS = "CONVNEUR_SIGNED_URLS"
"""Environment variable: a file of whole addresses, one or a {000..099} pattern a line, of shards known by `public`."""

_SECRET_NAME = re.compile(
    r"sig|tok|secret|key|cred|pass|pwd|auth|hmac|policy|session|jwt|hash|md5|sha|ticket|code|nonce|user", re.IGNORECASE
)
_OPAQUE = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+/=%~-]{16,}")
_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?")
_LOGIN = re.compile(r"(\w://)([^\s/'\"@]*|[^\s/'\":@\[]*:(?!\d*(/|\s|$))[^\s'\"]*)@")
_LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SUB_DELIMITERS = "!$&'()*+,;=:@%~"


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL."""
    return "://" in name


def public(address: str) -> str:
    """An address as it may be shown and kept: without user, password, and a query that grants access."""
    if not is_remote(address):
        return address
    scheme, _, rest = address.partition("://")
    on_web = scheme.lower() in ("http", "https")
    place, mark, query = rest.partition("?") if on_web else (rest, "", "")
    authority, slash, path = place.partition("/")
    host = authority.rpartition("@")[2]
    if not _HOST.fullmatch(host) or (host != authority and not on_web):
        return f"{scheme}://***"  # perhaps a / in a password cut it off
    return f"{scheme}://{host}{slash}{path}" + ("" if _grants_access(query) else mark + query)


def _grants_access(query: str) -> bool:
    """Whether a query may hold a secret: by its names, or as a value looks drawn at random."""
    for part in re.split(r"[&;]", query):
        name, given, value = part.partition("=")
        if (given and _SECRET_NAME.search(name)) or _OPAQUE.fullmatch(value if given else name):
            return True
    return False


def redact(text: str) -> str:
    """A library's message with what may be a secret in addresses taken out."""
    text = _LOGIN.sub(r"\1***@", text)
    return re.sub(r"\?([^\s'\"<>]+)", lambda found: "?***" if _grants_access(found[1]) else found[0], text)


def full(address: str) -> str:
    """The address to ask for a shard: the one that the file of signed addresses has for it, or its own.

    Raises:
        InputError: the file can't be read.
    """
    path = os.environ.get(SIGNED_URLS)
    if not path:
        return address
    try:
        signed = _signed(path, Path(path).stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no list of addresses"
        raise InputError(f"{SIGNED_URLS}: {path} can't be read ({reason}): expected an address a line") from None
    return signed.get(public(address), address)


@lru_cache(maxsize=1)
def _signed(path: str, _: int) -> dict[str, str]:
    """The file's addresses by their public form; it is read again when it has changed, as signatures expire."""
    lines = Path(path).read_text().split("\n")
    return {public(address): address for line in lines if line.strip() for address in braceexpand(line.strip())}


def request(address: str) -> Request:
    """What to send for an http or https address, of which blanks, # and what isn't ASCII need not be encoded.

    User and password, of the address or of ~/.netrc, go into a header that redirects don't pass on.

    Raises:
        InputError: it is no address.
    """
    try:
        parts = urlsplit(address.replace("#", "%23"))
        host = parts.netloc.rpartition("@")[2]
        if not parts.hostname or parts.port == 0 or re.search(r"[\s%]", host):
            raise ValueError
    except ValueError:
        scheme = address.partition("://")[0]
        raise InputError(
            f"an address that begins with {scheme}:// is none: expected {scheme}://HOST[:PORT]/PATH, with :, / and @ "
            "in a password written as %3A, %2F and %40"
        ) from None
    query = f"?{_quoted(parts.query, _SUB_DELIMITERS + '/?')}" if parts.query else ""
    asked = Request(f"{parts.scheme}://{host}{_quoted(parts.path or '/', _SUB_DELIMITERS + '/')}{query}")
    if login := _login(parts):
        token = base64.b64encode(":".join(login).encode()).decode()
        asked.add_unredirected_header("Authorization", f"Basic {token}")
    return asked


def _quoted(text: str, safe: str) -> str:
    return quote(_LONE_PERCENT.sub("%25", text), safe=safe, errors="surrogateescape")


def _login(parts: SplitResult) -> tuple[str, str] | None:
    """User and password for an address."""
    if parts.username is not None:
        return unquote(parts.username), unquote(parts.password or "")
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or "")
    except (OSError, netrc.NetrcParseError):  # most have none, and most servers need none
        return None
    return (found[0], found[2] or "") if found else None
