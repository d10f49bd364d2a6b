"""The reader of settings knows no schema but the one that it is given."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from convneur.data.errors import InputError
from convneur.settings import config_keys, load_as, yaml_text


@dataclass(frozen=True)
class Oven:
    degrees: float = 200.0
    fan: bool = False


@dataclass(frozen=True)
class Kitchen:
    oven: Oven = field(default_factory=Oven)
    knives: int = 3
    radio: dict[str, Any] = field(
        default_factory=dict, metadata={"example": "volume", "instead_of": {"song": "radio.station chooses it"}}
    )


def test_any_dataclass_is_read(tmp_path: Path) -> None:
    file = tmp_path / "kitchen.yaml"
    file.write_text("oven: {degrees: 180}\nradio: {station: {name: 3}}")
    kitchen = load_as(Kitchen, [file], ["--knives", "4", "--radio.station.on", "yes"])
    assert kitchen == Kitchen(Oven(180.0), 4, {"station": {"name": 3, "on": True}})
    file.write_text(yaml_text(kitchen))
    assert load_as(Kitchen, [file]) == kitchen
    assert list(config_keys(Kitchen)) == ["oven", "oven.degrees", "oven.fan", "knives", "radio"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--oven.degree", "1"], "--oven.degree is not a configuration key; did you mean --oven.degrees?"),
        (["--fan", "yes"], "--fan is not a configuration key; did you mean --oven.fan?"),
        (
            ["--deepspeed.stage", "1"],
            "--deepspeed.stage is not a configuration key; `convneur train --help` lists them",
        ),
        (["--song", "x"], "--song is not a configuration key; radio.station chooses it"),
        (["--radio", "3"], "--radio is 3, expected keys below it, such as radio.volume"),
        (["--oven", "3"], "--oven is '3', expected keys below it, such as oven.degrees"),
    ],
)
def test_only_keys_of_the_schema_are_named(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_as(Kitchen, overrides=words)
    assert str(caught.value) == message
