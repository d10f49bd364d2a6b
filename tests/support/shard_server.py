"""A server of shards that does what a test wants done, and the stream of what is read from it."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.prepare.foreign import prepare_index
from convneur.data.stores.choose import open_store
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
