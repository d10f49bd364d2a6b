"""What can't be read or shown of a sample is blamed on it, and another one stands in for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from convneur.data.errors import InputError, SampleError
from convneur.data.keys import key
from convneur.data.stores.store import Store
from convneur.data.stream.batch import BadSample
from convneur.data.views.decode import in_one_line

REPLACEMENTS = 16
"""How many unreadable samples in a row a single place of the stream puts up with."""

T = TypeVar("T")


@contextmanager
def blamed_on_sample(store: Store, index: int) -> Iterator[None]:
    """Makes whatever goes wrong in decoding and transforming a sample that sample's fault, a want of memory too.

    Raises:
        SampleError: something went wrong; names the sample.
        InputError: the storage fails.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a decoder or a resize may raise anything
        raise SampleError(f"{store.where(index)}: not a readable image ({in_one_line(error)})") from None


def read_or_replace(
    read: Callable[[int], T], samples: int, *, seed: int, epoch: int, place: int, index: int, bad: list[BadSample]
) -> tuple[int, T]:
    """Reads the sample at a place of an epoch or, if it can't be read, one that stands in for it.

    Args:
        read: what to read a sample with.
        samples: N.
        seed: the run's seed.
        epoch: counted from 0.
        place: in the epoch.
        index: the sample's number.
        bad: takes what can't be read.

    Returns:
        The number of the sample that was read, and what `read` made of it.

    Raises:
        InputError: none of `REPLACEMENTS` samples can be read.
    """
    for attempt in range(REPLACEMENTS):
        try:
            return index, read(index)
        except SampleError as error:
            bad.append(BadSample(index, str(error)))
        index = key(seed, "replacement", epoch, place, attempt) % samples
    raise InputError(
        f"{bad[-1].reason}; so are the {REPLACEMENTS - 1} drawn before it: check the dataset with "
        "`convneur data verify`"
    )
