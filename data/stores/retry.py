"""Patience with file systems and servers that fail for a moment."""

import time
from collections.abc import Callable
from typing import TypeVar

from convneur.data.errors import StorageError
from convneur.data.stores.addresses import public, redact

DELAYS = (0.2, 1.0, 5.0, 15.0)
"""Seconds between one attempt and the next."""

T = TypeVar("T")


def retrying(attempt: Callable[[], T], what: str, errors: type[Exception]) -> T:
    """Calls `attempt` until it succeeds, at most `len(DELAYS)` + 1 times.

    Args:
        attempt: what may fail.
        what: path or address that is read, for the message.
        errors: exceptions that another attempt may not see.

    Raises:
        StorageError: the last attempt failed as well.
    """
    for delay in DELAYS:
        try:
            return attempt()
        except errors:
            time.sleep(delay)
    try:
        return attempt()
    except errors as error:
        reason = (getattr(error, "strerror", None) or str(error) or repr(error)).splitlines()[0]
        raise StorageError(
            f"{public(what)} can't be read ({redact(reason)}), and {len(DELAYS) + 1} attempts in {sum(DELAYS):.0f} s "
            "made no difference: see to the disk or the server, then resume"
        ) from error
