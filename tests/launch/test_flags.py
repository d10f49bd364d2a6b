"""Every command, with flags that it hasn't and values that they can't have: one line, and nothing written."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import small_config

from convneur.config import save_config
from convneur.launch.cli import _parser, main
from convneur.launch.parser import Parser

NO_FLAGS = (
    ["--foo"], ["--foo=3"], ["--foo", "3"], ["-x"], ["---"], ["--=3"], ["--fo\no"], ["--\udcff"], [""], ["--run"],
    ["--foo.bar", "3"], ["--.", "3"], ["--run.name"], ["--deepspeed", "{"],
)  # fmt: skip
NO_NUMBERS = ("", " ", "x", "nan", "inf", "-1", "1e400", "9" * 25, "9" * 5000, "\udcff", "1\n2")


def commands(parser: Parser, words: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Parser]]:
    """Every command with its parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for name, one in below[0].choices.items() if below else ():
        yield from commands(one, (*words, name))
    if not below:
        yield list(words), parser


COMMANDS = {" ".join(words): parser for words, parser in commands(_parser())}


def complete(command: str) -> list[str]:
    """A command with all that it requires, though none of it is there."""
    words = command.split()
    for action in COMMANDS[command]._actions:
        if not action.option_strings:
            words.append("absent")
        elif action.required:
            value = "absent" if action.type in (None, Path) else "4"
            words += [action.option_strings[-1], *(action.choices or [value])[:1]]
    return words


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    """Runs a command line in an empty folder, and gives the one line that it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)

    def said(words: list[str]) -> str:
        assert main(words) == 2, words
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("convneur: error: ")
        assert output.err.count("\n") == 1, words
        return output.err

    yield said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flag_of_the_command(command: str, refused) -> None:  # type: ignore[no-untyped-def]
    for words in NO_FLAGS:
        line = refused([*complete(command), *words])
        if words[0] in ("--foo", "--foo=3", "---"):
            assert f"{words[0]} is not a flag of `convneur {command}`" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_no_value_of_the_flag(command: str, refused) -> None:  # type: ignore[no-untyped-def]
    for action in COMMANDS[command]._actions:
        if action.option_strings and action.nargs is None:
            flag = action.option_strings[-1]
            assert "is empty" in refused([*complete(command), flag, ""])
            if flag.startswith("--"):
                assert "is empty" in refused([*complete(command), f"{flag}="])
            if action.type not in (None, Path):
                for value in NO_NUMBERS:
                    assert flag in refused([*complete(command), f"{flag}={value}"])


BAD_VALUES = {
    "plan": ("run.eval_every_epochs=0", "data.image_size=0", "data.repeats=0", "train.accumulation=-1",
             "data.global_batch_size=-1", "model.num_classes=0", "model.num_classes=" + "9" * 25),
    "data show": ("data.cache_gb=1e400", "data.image_size=0", "data.augment.scale=[0, 0]"),
    "ablate --dry-run": ("data.image_size=1", "model.variant=2x9999-1-1-1"),
    "study status": ("study.epochs=[0]", "study.lrs=[-1]", "study.seeds=[-1]"),
    "study run --plan": ("study.unique_images=[99999]", "optimizer.lr=0"),
}  # fmt: skip


@pytest.mark.parametrize("command", BAD_VALUES)
def test_what_trains_nothing_refuses_impossible_values_too(  # type: ignore[no-untyped-def]
    command: str, digits: Path, tmp_path_factory: pytest.TempPathFactory, refused
) -> None:
    config = tmp_path_factory.mktemp("config") / "small.yaml"
    save_config(small_config(digits, 1), config)
    words = command.split()
    words[2:2] = [str(config)] if words[0] == "study" else [str(digits)] if words[0] == "data" else []
    words += ["--config", str(config)] if words[0] not in ("study",) else []
    words += ["--gpus-per-node", "1"] if "plan" in command else []
    words += ["--study.sizes", "[4x1-1-1-1]"] if words[0] == "study" else []
    for value in BAD_VALUES[command]:
        refused([*words, f"--{value}"])
