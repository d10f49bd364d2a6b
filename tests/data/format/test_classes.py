"""Names of classes: their order, and which of a model's classes those of other data are."""

from pathlib import Path

import numpy as np
import pytest
from timm.utils.misc import natural_key

from convneur.data.errors import InputError
from convneur.data.format.classes import check_same_classes, map_classes, read_class_map, sorted_classes

MODEL = ("ant", "bee", "cat")


def test_numbers_sort_as_numbers() -> None:
    numbers = [str(number) for number in range(1000)]
    assert list(sorted_classes(reversed(numbers))) == sorted(numbers, key=natural_key) == numbers
    assert sorted_classes(["10", "02", "1"]) == ("1", "02", "10")
    assert sorted_classes(["n10", "n9", "B", "a", "10"]) == ("10", "B", "a", "n10", "n9")  # as torchvision


def test_classes_are_told_by_name() -> None:
    present = np.array([0, 1])
    assert map_classes(MODEL, np.arange(3), MODEL, None, "data").tolist() == [0, 1, 2]
    assert map_classes(("cat", "ant", "dog"), present, MODEL, None, "data").tolist() == [2, 0, 0]
    several = {"tabby": "cat", "siamese": "cat", "wasp": "bee"}
    assert map_classes(("tabby", "siamese"), present, MODEL, several, "data").tolist() == [2, 2]
    assert map_classes(("ant", "bee"), present, MODEL, {"ant": "bee", "bee": "ant"}, "data").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("data", "model", "class_map", "message"),
    [
        (("ant", "dog"), MODEL, None, r"data has images of 1 class \(dog\), but the model was trained on 3 classes"),
        (("0", "1"), MODEL, None, r"images of 2 classes \(0, 1\).*--class-map FILE"),
        (("0", "1"), MODEL, {"0": "ant"}, r"no line for 1 class \(1\) of data"),
        (("0", "1"), MODEL, {"0": "ant", "1": "dog"}, r"names 1 class \(dog\), but the model's classes are 3"),
        (("ant", "bee"), ("ant", "bee", "ant"), None, "several classes are called ant"),
    ],
)
def test_what_is_not_known_is_refused(
    data: tuple[str, ...], model: tuple[str, ...], class_map: dict[str, str] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        map_classes(data, np.array([0, 1]), model, class_map, "data")


def test_a_class_map_is_lines_of_two_names(tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(
        "\ufeff0\tgreat white shark\r\n\r\n1  n01443537\n sea\u2028lion \t fish\n0\tgreat white shark".encode()
    )
    assert read_class_map(path) == {"0": "great white shark", "1": "n01443537", "sea\u2028lion": "fish"}
    for content, message in (
        (b"0 ant\n1\n", "line 2 is '1', expected"),
        (b"0 a b\n", "line 1 is '0 a b', expected"),
        (b"0\tant\n0\tbee\n", "line 2 gives class 0 a second class"),
        (b"\xff\n", "no UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_class_map(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="can't be read"):
        read_class_map(tmp_path)


def test_other_classes_are_not_the_same() -> None:
    check_same_classes(MODEL, MODEL, Path("c"), "data")
    with pytest.raises(InputError, match="trained on 3 classes, but data has 2"):
        check_same_classes(MODEL, MODEL[:2], Path("c"), "data")
    with pytest.raises(InputError, match="trained with 'bee' as class 1, which is 'cat' in data"):
        check_same_classes(MODEL, ("ant", "cat", "bee"), Path("c"), "data")
