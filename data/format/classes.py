"""Names of classes: their order, and which classes of a model those of another dataset are."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from convneur.data.errors import InputError

NAMED = 3
"""How many names a message lists."""


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Names in the order of their labels: as numbers where all are made of digits, as timm does, else as text."""
    names = list(names)
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def read_class_map(path: Path) -> dict[str, str]:
    """Reads which class of a model each class of a dataset is.

    A line is a dataset's class, a tab and the model's class; blanks do instead of the tab where neither name has any.
    Several classes of the dataset may be one of the model's. Empty lines say nothing.

    Raises:
        InputError: the file can't be read, or a line says something else or contradicts an earlier one.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"--class-map {path} can't be read ({error.strerror}): name a text file") from None
    except ValueError as error:
        raise InputError(f"--class-map {path} is no UTF-8 text ({error}): name a text file") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        parts = [part.strip() for part in (line.split("\t") if "\t" in line else line.split())]
        if len(parts) != 2 or not all(parts):
            raise InputError(
                f"--class-map {path}, line {number} is {line.strip()!r}, expected a class of the dataset, a tab, and "
                "which class of the model it is"
            )
        if found.setdefault(parts[0], parts[1]) != parts[1]:
            raise InputError(f"--class-map {path}, line {number} gives class {parts[0]} a second class: keep one line")
    return found


def map_classes(
    data: Sequence[str], present: np.ndarray, model: Sequence[str], class_map: dict[str, str] | None, where: str
) -> np.ndarray:
    """Finds which class of a model each of a dataset's is, by name.

    Args:
        data: the dataset's class names.
        present: labels that its samples have, (P,) int64.
        model: the model's class names, in the order of its logits.
        class_map: what the dataset's classes are called among the model's; None where they are called the same.
        where: names the dataset, for messages.

    Returns:
        The model's label for each of the dataset's, (K,) int64; 0 for classes without samples that the model lacks.

    Raises:
        InputError: a class that is present isn't known to be one of the model's.
    """
    if class_map is None and tuple(data) == tuple(model):
        return np.arange(len(data))
    if doubled := [name for names in (data, model) for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{where} can't be told by name: several classes are called {doubled[0]}")
    numbers = {name: label for label, name in enumerate(model)}
    if class_map is not None:
        if unknown := [name for name in class_map.values() if name not in numbers]:
            raise InputError(f"--class-map names {listed(unknown)}, but the model's classes are {listed(model)}")
        if missing := [data[label] for label in present if data[label] not in class_map]:
            raise InputError(f"--class-map has no line for {listed(missing)} of {where}: it takes one for each class")
    elif unknown := [data[label] for label in present if data[label] not in numbers]:
        raise InputError(
            f"{where} has images of {listed(unknown)}, but the model was trained on {listed(model)}: say with "
            "--class-map FILE which class of the model each class of the data is"
        )
    names = data if class_map is None else [class_map.get(name, "") for name in data]
    return np.array([numbers.get(name, 0) for name in names], np.int64)


def check_same_classes(trained: Sequence[str], here: Sequence[str], checkpoint: Path, root: str) -> None:
    """Refuses to go on with other classes than those that a checkpoint was trained on.

    Raises:
        InputError: names, their order or their number differ.
    """
    if len(trained) != len(here):
        raise InputError(
            f"{checkpoint} was trained on {len(trained)} classes, but {root} has {len(here)}: resume with the dataset "
            "that it was trained on, or start a new run"
        )
    for label, (then, now) in enumerate(zip(trained, here, strict=True)):
        if then != now:
            raise InputError(
                f"{checkpoint} was trained with {then!r} as class {label}, which is {now!r} in {root}: resume with the "
                "dataset that it was trained on, or start a new run"
            )


def listed(names: Sequence[str]) -> str:
    """Such as "5 classes (0, 1, 2, ...)"."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names):,} class{'es' * (len(names) != 1)} ({', '.join(names[:NAMED])}{more})"
