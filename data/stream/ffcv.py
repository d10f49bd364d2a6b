"""Training batches through FFCV's own loader, made deterministic, resumable and wary of damage.

FFCV takes an order and a decoder of one's own:

- `_TicketOrder` hands it `LaneOrder`'s samples. A ticket, (epoch * repeats + repetition) * (rows of the beton) + row,
  says all that an image depends on besides the seed, so decoder threads share no state and are told of no epoch.
- `_TicketDecoder` draws crop and flips from a hash of (seed, ticket); FFCV's own draws from generators of its threads,
  which differ from run to run. It also looks at what libjpeg-turbo says of an image, which FFCV's own doesn't.

Importing this module takes FFCV, and seconds. Whatever numba compiles, it compiles at the first batch.
Legend: b samples in a micro-batch, H x W pixels of the model's input.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from queue import Empty
from typing import Any

import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.traversal_order.base import TraversalOrder

from convneur.data.config import DataConfig
from convneur.data.format.beton import JPG
from convneur.data.keys import key
from convneur.data.stores.beton import BetonStore
from convneur.data.stores.store import Store
from convneur.data.stream.batch import BadSample, Batch, Request
from convneur.data.stream.reading import blamed_on_sample, read_or_replace
from convneur.data.stream.train import TrainLoader
from convneur.data.views.decode import decode

Word = Any
"""A whole number that compiled code takes for 64 bits without a sign."""

ATTEMPTS = 10
"""How many random crops are tried before the centre is taken, as torchvision does."""

# Compiled code. FFCV compiles with fastmath, which may round differently from one compilation to the next; these
# functions are compiled without, and keep that where they are called from FFCV's code.
_compiled = numba.njit(error_model="numpy", nogil=True)
_imdecode = _compiled(imdecode)
_resize_crop = _compiled(resize_crop)


@_compiled
def random_word(seed: Word, ticket: Word, draw: Word) -> Word:
    """Uniform uint64, a function of three uint64s: SplitMix64's finalizer over a counter, twice.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, with Stafford's constants.
    """
    word = np.uint64(seed)
    for part in (np.uint64(ticket), np.uint64(draw)):
        word = word + (part + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word = word ^ (word >> np.uint64(31))
    return word


@_compiled
def _uniform(seed: Word, ticket: Word, draw: Word) -> Any:
    """Uniform in [0, 1)."""
    return np.float64(random_word(seed, ticket, draw) >> np.uint64(11)) * 2.0**-53


@_compiled
def random_crop(height: int, width: int, settings: np.ndarray, seed: Word, ticket: Word) -> tuple[int, int, int, int]:
    """Draws top, left, height and width of a crop as torchvision's RandomResizedCrop, from draws 0..4 ATTEMPTS - 1.

    Args:
        height: of the image.
        width: of the image.
        settings: begins with smallest and largest area, narrowest and widest ratio.
        seed: 64 bits.
        ticket: 64 bits.
    """
    smallest, largest, narrowest, widest = settings[0], settings[1], settings[2], settings[3]
    for attempt in range(ATTEMPTS):
        area = height * width * (smallest + (largest - smallest) * _uniform(seed, ticket, 4 * attempt))
        logarithm = math.log(narrowest) + math.log(widest / narrowest) * _uniform(seed, ticket, 4 * attempt + 1)
        ratio = math.exp(logarithm)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(_uniform(seed, ticket, 4 * attempt + 2) * (height - h + 1))
            left = int(_uniform(seed, ticket, 4 * attempt + 3) * (width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width < narrowest * height:
        h = max(min(height, round(width / narrowest)), 1)
    elif width > widest * height:
        w = max(min(width, round(height * widest)), 1)
    return (height - h) // 2, (width - w) // 2, h, w


@_compiled
def augment(image: np.ndarray, settings: np.ndarray, seed: Word, ticket: Word, out: np.ndarray) -> None:
    """Crops, resizes and flips an image.

    Args:
        image: (height, width, 3) uint8.
        settings: (6,) float64: smallest and largest area, narrowest and widest ratio, probabilities of a horizontal and
            a vertical flip.
        seed: 64 bits.
        ticket: 64 bits.
        out: (H, W, 3) uint8, to write to.
    """
    top, left, height, width = random_crop(image.shape[0], image.shape[1], settings, seed, ticket)
    _resize_crop(image, top, top + height, left, left + width, out)
    if _uniform(seed, ticket, 4 * ATTEMPTS) < settings[4]:
        for row in range(out.shape[0]):
            for column in range(out.shape[1] // 2):
                for channel in range(3):
                    other = out[row, -1 - column, channel]
                    out[row, -1 - column, channel] = out[row, column, channel]
                    out[row, column, channel] = other
    if _uniform(seed, ticket, 4 * ATTEMPTS + 1) < settings[5]:
        for row in range(out.shape[0] // 2):
            for column in range(out.shape[1]):
                for channel in range(3):
                    other = out[-1 - row, column, channel]
                    out[-1 - row, column, channel] = out[row, column, channel]
                    out[row, column, channel] = other


@_compiled
def _decode_and_augment(
    content: np.ndarray,
    is_jpg: bool,
    height: Any,
    width: Any,
    settings: np.ndarray,
    seed: Word,
    ticket: Word,
    out: np.ndarray,
) -> bool:
    """Whether an image could be decoded; `out` has it then."""
    if is_jpg:
        # Made here: FFCV's own decoders hold room for the largest image of all for each sample of several batches.
        image = np.empty((height, width, 3), np.uint8)
        if _imdecode(content, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
            return False
    else:
        image = content.reshape((height, width, 3))
    augment(image, settings, seed, ticket, out)
    return True


class _TicketDecoder(SimpleRGBImageDecoder):
    """FFCV's decoder operation for tickets: gives (b, H, W, 3) uint8 images and (b,) int32 flags, 1 where decoded."""

    def __init__(self, image_size: int, settings: np.ndarray, seed: Word):
        super().__init__()
        self._image_size, self._settings, self._seed = image_size, settings, seed

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, tuple[AllocationQuery, AllocationQuery]]:
        """Names what a batch takes: FFCV's interface."""
        shape, dtype = (self._image_size, self._image_size, 3), np.dtype("<u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        # Flags are no bytes: FFCV has numba take rows of bytes for read-only, everywhere.
        return state, (AllocationQuery(shape, dtype), AllocationQuery((), np.dtype("<i4")))

    def generate_code(self) -> Callable[..., Any]:
        """Returns the function that FFCV compiles."""
        memory_read, threads_range = self.memory_read, Compiler.get_iterator()
        settings, seed, rows = self._settings, self._seed, np.int64(len(self.metadata))

        def decode_batch(tickets: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
            images, flags = memory
            for place in threads_range(len(tickets)):
                ticket = tickets[place]
                entry = metadata[ticket % rows]
                content = memory_read(entry["data_ptr"], storage_state)
                height, width = np.int64(entry["height"]), np.int64(entry["width"])
                flags[place] = _decode_and_augment(
                    content, entry["mode"] == JPG, height, width, settings, seed, ticket, images[place]
                )
            return images[: len(tickets)], flags[: len(tickets)]

        decode_batch.is_parallel = True  # type: ignore[attr-defined]  # FFCV's compiler looks for it
        return decode_batch


class _TicketOrder(TraversalOrder):
    """The order in which FFCV reads, as an instance: FFCV calls it as if it were the class.

    Args:
        tickets: of the longest epoch to come, (samples,); FFCV takes the number of batches from it, once.
    """

    def __init__(self, tickets: np.ndarray):
        self.tickets = tickets

    def __call__(self, loader: Loader) -> "_TicketOrder":
        return self

    def sample_order(self, epoch: int) -> np.ndarray:
        """Returns what is set; FFCV's own count of epochs has no bearing."""
        return self.tickets


class FfcvLoader(TrainLoader):
    """`TrainLoader` whose images are read and decoded by FFCV's loader, in `data.workers` threads of this process.

    Order, replacements and state are `TrainLoader`'s. Crops and flips are drawn from the same distributions but are
    others, and pixels are those of FFCV's decoder and resize.
    """

    def __init__(self, config: DataConfig, store: Store, *, seed: int, rank: int, world_size: int, accumulation: int):
        super().__init__(config, store, seed=seed, rank=rank, world_size=world_size, accumulation=accumulation)
        assert isinstance(store, BetonStore)  # `check_data` saw to it
        self._beton = store
        augment = config.augment
        self._settings = np.array([*augment.scale, *augment.ratio, augment.hflip, augment.vflip], np.float64)
        self._key = np.uint64(key(seed, "ffcv"))
        self._micro_batch_size = config.global_batch_size // (world_size * accumulation)

    def iterate(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Reads optimizer steps `start_step` to `stop_step - 1`; see `TrainLoader.iterate`."""
        step = start_step
        while step < stop_step:
            # FFCV takes an epoch's order as a whole, and starts its thread anew for each.
            end = min(stop_step, (step // self.steps_per_epoch + 1) * self.steps_per_epoch)
            requests = list(self._requests(step, end))
            with self._decoded([self._tickets(request) for request in requests]) as decoded:
                accumulation = len(self._micro_lanes)
                for first in range(0, len(requests), accumulation):
                    micro_batches = [
                        self._batch(request, *next(decoded)) for request in requests[first : first + accumulation]
                    ]
                    for batch in micro_batches:
                        self.bad_samples.update(batch.bad)
                    yield micro_batches
            step = end

    def _tickets(self, request: Request) -> np.ndarray:
        """Tickets of a micro-batch's samples, (b,) int64."""
        return self._ticket(request.epoch, request.repetitions, request.indices)

    def _ticket(self, epoch: int, repetition: Any, index: Any) -> Any:
        return (epoch * self._config.repeats + repetition) * len(self._beton.images) + self._beton.rows(index)

    @cached_property
    def _ffcv(self) -> Loader:
        with _torch_threads_kept():
            return Loader(
                str(self._beton.path),
                batch_size=self._micro_batch_size,
                # numba has a thread a processor and no more; what comes out doesn't depend on how many work.
                num_workers=min(max(self._config.workers, 1), numba.config.NUMBA_NUM_THREADS),  # type: ignore[attr-defined]
                os_cache=True,
                order=_TicketOrder(np.zeros(self.steps_per_epoch * len(self._micro_lanes) * self._micro_batch_size)),
                pipelines={
                    "image": [_TicketDecoder(self._config.image_size, self._settings, self._key)],
                    "label": None,
                },
            )

    @contextmanager
    def _decoded(self, tickets: list[np.ndarray]) -> Iterator[Iterator[tuple[np.ndarray, np.ndarray]]]:
        """Images and flags of micro-batches, each valid until the next is asked for."""
        self._ffcv.traversal_order.tickets = np.concatenate(tickets)
        with _torch_threads_kept():
            batches = iter(self._ffcv)

        def results() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            while True:
                while batches.output_queue.empty():
                    # Waiting at the queue itself would last for ever if FFCV's thread died of an exception.
                    if not batches.is_alive() and batches.output_queue.empty():
                        raise RuntimeError("FFCV's loader has died of the exception above")
                    time.sleep(0.0005)
                ((images, flags),) = next(batches)
                yield images, flags

        try:
            yield results()
        finally:
            batches.close()
            while batches.is_alive():  # its last word would wait for room in the queue for ever
                with suppress(Empty):
                    batches.output_queue.get(timeout=0.05)

    def _batch(self, request: Request, decoded: np.ndarray, flags: np.ndarray) -> Batch:
        """A micro-batch from what FFCV has made of it, checked sample by sample."""
        images = torch.from_numpy(decoded.copy()).permute(0, 3, 1, 2)
        indices, bad = request.indices.copy(), list[BadSample]()
        for offset, (index, repetition) in enumerate(zip(indices.tolist(), request.repetitions.tolist(), strict=True)):
            if flags[offset] and self._beton.is_intact(index):
                continue
            indices[offset], image = read_or_replace(
                partial(self._read, request.epoch, repetition),
                len(self._beton),
                seed=self._seed,
                epoch=request.epoch,
                place=request.first + offset,
                index=index,
                bad=bad,
            )
            images[offset] = image
        return Batch(
            images=images.pin_memory() if torch.cuda.is_available() else images,
            labels=torch.from_numpy(self._beton.labels_of(indices)),
            indices=torch.from_numpy(indices),
            epoch=request.epoch,
            step=request.step,
            lanes=request.lanes,
            repetitions=torch.from_numpy(request.repetitions),
            bad=tuple(bad),
        )

    def _read(self, epoch: int, repetition: int, index: int) -> torch.Tensor:
        """Reads a sample without FFCV: one that it couldn't decode, or a replacement; (3, H, W) uint8."""
        sample = self._beton.read(index)
        out = np.empty((self._config.image_size, self._config.image_size, 3), np.uint8)
        ticket = np.int64(self._ticket(epoch, repetition, index))
        with blamed_on_sample(self._beton, index):
            pixels = np.require(decode(sample.image), requirements=["C", "W"])
            augment(pixels, self._settings, self._key, ticket, out)
        return torch.from_numpy(out).permute(2, 0, 1)


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """FFCV sets the number of torch's threads to that of its own."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
