"""Which tokens meet which state of the neural memory: the one place that knows the reading orders."""

from typing import Literal, NamedTuple

ReadOrder = Literal["before_update", "after_update", "final_state"]

NOTHING = slice(0, 0)


class Step(NamedTuple):
    """The tokens that meet state M_t: `keys` are written and make M_{t+1} of it, `queries` read it as it is."""

    keys: slice
    queries: slice

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of keys and of queries."""
        return self.keys.stop - self.keys.start, self.queries.stop - self.queries.start


def steps(read: ReadOrder, tokens: int, chunk_length: int) -> list[Step]:
    """Steps t = 0, 1, ... through an image. Those that write come first; every token is read once, in order."""
    chunks = [slice(start, min(start + chunk_length, tokens)) for start in range(0, tokens, chunk_length)]
    match read:
        case "before_update":
            keys, queries = [*chunks[:-1], NOTHING], chunks
        case "after_update":
            keys, queries = [*chunks, NOTHING], [NOTHING, *chunks]
        case "final_state":
            keys, queries = chunks + [NOTHING] * len(chunks), [NOTHING] * len(chunks) + chunks
    return [Step(k, q) for k, q in zip(keys, queries, strict=True)]


def updates(read: ReadOrder, tokens: int, chunk_length: int) -> int:
    """Number of steps that write. What the last chunk writes is not read where reading comes before the update."""
    chunks = (tokens + chunk_length - 1) // chunk_length
    return chunks - 1 if read == "before_update" else chunks


def written_tokens(read: ReadOrder, tokens: int, chunk_length: int) -> int:
    """Number of tokens, counted from the first, that are ever written."""
    return updates(read, tokens, chunk_length) * chunk_length if read == "before_update" else tokens
