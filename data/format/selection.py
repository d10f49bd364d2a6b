"""Which files of a source are taken and which are left out, in numbers that add up."""

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"})
"""What torchvision's ImageFolder reads, whatever the case."""

LITTER = frozenset(
    {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
)
"""Names, in small letters, of what systems leave in people's folders, besides hidden files."""

NAMED = 3
"""How many files a line names for each reason."""

HIDDEN, OTHER = "hidden or of the system", "that are no images"


class Tally:
    """Counts of a split's files.

    Attributes:
        taken: images.
        left_out: files that are not taken, by reason.
        noted: images that are taken, by what is odd about them.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.left_out: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def leave_out(self, reason: str, name: str) -> None:
        """Counts a file that isn't taken."""
        self.left_out[reason] += 1
        self._name(reason, [name])

    def note(self, what: str, name: str) -> None:
        """Counts an image that is taken all the same."""
        self.noted[what] += 1
        self._name(what, [name])

    def add(self, others: Iterable["Tally"]) -> "Tally":
        """Adds the counts of other parts of the split; returns itself."""
        for other in others:
            self.taken += other.taken
            self.left_out += other.left_out
            self.noted += other.noted
            for reason, names in other._names.items():
                self._name(reason, names)
        return self

    def lines(self, split: str) -> list[str]:
        """What is to be said of the split: nothing, or a line about files left out and one about odd images."""
        lines = []
        if self.left_out:
            total = self.left_out.total()
            lines.append(
                f"{split}: {self.taken:,} images taken, {total:,} files left out: {self._listed(self.left_out)}"
            )
        if self.noted:
            lines.append(f"{split}: of the images taken, {self._listed(self.noted)}")
        return lines

    def _name(self, reason: str, names: list[str]) -> None:
        known = self._names.setdefault(reason, [])
        known += names[: NAMED - len(known)]

    def _listed(self, counts: Counter[str]) -> str:
        return "; ".join(
            f"{count:,} {what} ({', '.join(self._names[what])}{', ...' if count > len(self._names[what]) else ''})"
            for what, count in counts.items()
        )


def extension(name: str) -> str:
    """What follows the last dot of a file's name, in small letters; empty if nothing does."""
    return PurePosixPath(name).suffix[1:].lower()


def is_litter(name: str) -> bool:
    """Whether a path leads to, or through, what is hidden or was left by a system: .x, ._x, __MACOSX, Thumbs.db."""
    return any((part.startswith(".") and part != "..") or part.lower() in LITTER for part in PurePosixPath(name).parts)


def readable(name: str) -> str:
    r"""A file's name as text; bytes that are no UTF-8 become \xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
