"""What a command's ranks are told."""

from argparse import Namespace

import pytest

from convneur.launch.cli import _parser
from convneur.launch.rank import words_of_rank


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "run", "--launch", "local", "--crop", "0.9", "--class-map", "a b"],
        ["eval", "--image-size=40", "--ema", "--split", "val", "--json", "--", "--odd"],
    ],
)
def test_ranks_get_all_words_and_are_ranks_whatever_these_say(words: list[str]) -> None:
    args = _parser().parse_args(words, Namespace(words=words))
    of_rank = _parser().parse_args(words_of_rank(args))
    assert of_rank.launch == "env"
    for name in vars(args).keys() - {"launch", "words", "parser"}:
        assert getattr(of_rank, name) == getattr(args, name)
