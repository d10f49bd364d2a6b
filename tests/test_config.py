"""Configurations: what wins, what is refused and how that is said, and that a saved one is read back as it was."""

import re
from dataclasses import asdict, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import CONFIGS

from convneur.config import Config, deepspeed_config, load_config, save_config
from convneur.data.errors import InputError
from convneur.engine.section import parse_with_deepspeed
from convneur.limits import check_config
from convneur.models.convneur.config import VARIANTS, MemoryConfig, ModelConfig
from convneur.settings import config_keys, nearest_key


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_sources_win(tmp_path: Path) -> None:
    first = write(tmp_path / "1.yaml", "optimizer: {lr: 0.1, weight_decay: 0.2}\nschedule: {epochs: 7}")
    second = write(tmp_path / "2.yaml", "optimizer: {lr: 0.3}\nmodel:")
    config = load_config([first, second], ["--schedule.epochs=8", "--run.name", "123", "--run.root=--here"])
    assert config == replace(
        Config(),
        optimizer=replace(Config().optimizer, lr=0.3, weight_decay=0.2),
        schedule=replace(Config().schedule, epochs=8),
        run=replace(Config().run, name="123", root="--here"),
    )


def test_nothing_given_is_the_defaults() -> None:
    assert load_config() == Config()


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1.e-3", "0.001", "10e-4"])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "c.yaml", f"optimizer: {{lr: {text}}}\ndeepspeed: {{a: {text}}}")
    config = load_config([file], ["--schedule.min_lr", text, "--deepspeed.b", text])
    assert (config.optimizer.lr, config.schedule.min_lr) == (0.001, 0.001)
    assert config.deepspeed == {"a": 0.001, "b": 0.001}


def test_overrides_are_merged_into_the_deepspeed_section(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.yaml", "deepspeed: {zero_optimization: {stage: 1, overlap_comm: false}, dump_state: true}"
    )
    overrides = ["--deepspeed.zero_optimization.stage", "3", "--deepspeed.wandb", "{enabled: no}"]
    assert load_config([file], [*overrides, "--deepspeed.wandb.team", "'1'"]).deepspeed == {
        "zero_optimization": {"stage": 3, "overlap_comm": False},
        "dump_state": True,
        "wandb": {"enabled": False, "team": "1"},
    }


def test_values_take_the_type_of_their_field(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "optimizer: {lr: 1, betas: [0, 1]}\nmodel: {chunk_lengths: [1, 2, 3, 4]}")
    config = load_config([file], ["--data.augment.scale", "[0.5, 1]"])
    assert isinstance(config.optimizer.lr, float)
    assert config.optimizer.betas == (0.0, 1.0)
    assert config.model.chunk_lengths == (1, 2, 3, 4)
    assert config.data.augment.scale == (0.5, 1.0)
    assert load_config([file], ["--model.chunk_lengths", "null"]).model.chunk_lengths is None


def test_a_file_wins_over_what_it_includes(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "recipes" / "base.yaml", "schedule: {epochs: 600, warmup_epochs: 3}\noptimizer: {lr: 0.2}")
    write(tmp_path / "recipes" / "long.yaml", "include: base.yaml\nschedule: {epochs: 900}")
    file = write(tmp_path / "c.yaml", "include: recipes/long.yaml\noptimizer: {lr: 0.1}")
    config = load_config([file])
    assert (config.schedule.epochs, config.schedule.warmup_epochs, config.optimizer.lr) == (900, 3, 0.1)
    # A recipe given after a file wins over that file.
    assert load_config([file, tmp_path / "recipes" / "base.yaml"]).optimizer.lr == 0.2
    save_config(config, tmp_path / "saved.yaml")
    assert "include" not in (tmp_path / "saved.yaml").read_text()
    assert load_config([tmp_path / "saved.yaml"]) == config


def test_bad_include_is_refused_in_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "include: [a.yaml]")
    assert refusal(partial(load_config, [file])) == matching(f"{file}: include is ['a.yaml'], expected a pa.*")
    write(file, "include: absent.yaml")
    assert refusal(partial(load_config, [file])) == matching(f"{file}: include: {tmp_path}/absent.yaml: can't be re.*")
    write(file, "include: d.yaml")
    write(tmp_path / "d.yaml", "include: c.yaml")
    assert refusal(partial(load_config, [file])) == matching(f"{tmp_path}/d.yaml: include: .*include each other.*")
    write(tmp_path / "d.yaml", "optimizer: {lr: fast}")
    assert refusal(partial(load_config, [file])) == matching(f"{tmp_path}/d.yaml: optimizer.lr is 'fast', exp.*")


BAD_FILES = {
    "modle: {variant: m3}": "modle is not a configuration key; did you mean model?",
    "data: {augment: {mixupp: 3}}": "data.augment.mixupp is not a configuration key; did you mean data.augment.mixup?",
    "amp: true": "amp is not a configuration key; deepspeed.torch_autocast sets mixed precision",
    "train: {amp: true}": "train.amp is not a configuration key; deepspeed.torch_autocast sets mixed precision",
    "train: {epochs: 3}": "train.epochs is not a configuration key; did you mean schedule.epochs?",
    "1: 2": "1 is not a configuration key; `convneur train --help` lists them",
    "optimizer: {lr: fast}": "optimizer.lr is 'fast', expected a number",
    "optimizer: {lr: true}": "optimizer.lr is True, expected a number",
    "optimizer: {lr: null}": "optimizer.lr is None, expected a number",
    "optimizer: {betas: [0.9]}": "optimizer.betas is [0.9], expected a list of 2, each a number",
    "schedule: {epochs: 3.0}": "schedule.epochs is 3.0, expected a whole number",
    "run: {name: 12}": "run.name is 12, expected text, in quotes if YAML takes it for something else",
    "data: {interpolation: nearest}": "data.interpolation is 'nearest', expected one of 'bilinear', .*",
    "model: {variant: m10}": "model.variant is 'm10', expected one of 'n1', .*",
    "model: {drop_path: 1.5}": "model.drop_path is 1.5, expected a rate in .*",
    "model: {chunk_lengths: [1, 2]}": "model.chunk_lengths is [1, 2], expected a list of 4, each a whole number or n.*",
    "model: m3": "model is 'm3', expected keys below it, such as model.variant",
    "deepspeed: 3": "deepspeed is 3, expected keys below it, such as deepspeed.zero_optimization.stage",
    "[1, 2]": "holds [1, 2], expected sections such as 'model:' with keys below them",
    "run: {seed: 1\n": "not valid YAML (line 2: .*)",
    "run: {seed: 1}\nmodel:\nrun: {seed: 2}": "not valid YAML (line 1: 'run' is given twice)",
    "run: !!python/object/apply:os.getcwd []": "not valid YAML (line 1: could not determine a constructor .*)",
    "run: \0": "not valid YAML (.*)",
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.items(), ids=str)
def test_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "c.yaml", text)
    assert refusal(partial(load_config, [file])) == matching(f"{file}: {message}")


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_unreadable_file_is_refused(tmp_path: Path, name: str) -> None:
    assert refusal(partial(load_config, [tmp_path / name])) == matching(
        f"{tmp_path / name}: can't be read (.*), expected a YAML file"
    )


BAD_OVERRIDES = {
    ("--optimiser.lr", "1"): "--optimiser.lr is not a configuration key; did you mean --optimizer.lr?",
    ("--epochs", "1"): "--epochs is not a configuration key; did you mean --schedule.epochs?",
    ("--optimizer.lr", "fast"): "--optimizer.lr is 'fast', expected a number",
    ("--run.seed", "null"): "--run.seed is 'null', expected a whole number",
    ("--model.variant", "m10"): "--model.variant is 'm10', expected one of 'n1', .*",
    ("--model", "m3"): "--model is 'm3', expected keys below it, such as model.variant",
    ("--run.seed",): "--run.seed has no value, expected --run.seed VALUE, or .*",
    ("--run.seed", "--run.name", "a"): "--run.seed has no value, expected --run.seed VALUE, or .*",
    ("run.seed", "1"): "'run.seed' belongs to no flag, expected --section.key value",
    ("--deepspeed.x", "{"): "--deepspeed.x is '{', which is not valid YAML (line 1: .*)",
    ("--deepspeed", "3"): "--deepspeed is 3, expected keys below it, such as deepspeed.zero_optimization.stage",
}


@pytest.mark.parametrize(("words", "message"), BAD_OVERRIDES.items(), ids=str)
def test_bad_override_is_refused_in_one_line(words: tuple[str, ...], message: str) -> None:
    assert refusal(partial(load_config, overrides=words)) == matching(message)


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", "-.inf", "1e999"])
def test_no_number_may_be_nan_or_infinite(tmp_path: Path, value: str) -> None:
    """Of any key there is, alone or in a list, nor anywhere in what goes to DeepSpeed."""

    def numbers(key: str, default: Any) -> Any:
        parts = [str(part) for part in default] if isinstance(default, tuple) else []
        return f"[{', '.join([*parts[1:], value])}]" if parts else value

    defaults = {key: attrgetter(key)(Config()) for key in config_keys(Config)}
    found = {key: default for key, default in defaults.items() if re.search(r"\d\.\d|e-", str(default))}
    found = {key: default for key, default in found.items() if isinstance(default, float | tuple)}
    assert {"data.mean", "optimizer.betas", "data.augment.mixup", "guards.spike", "schedule.min_lr"} < found.keys()
    for key, default in found.items():
        refused = refusal(partial(load_config, overrides=[f"--{key}={numbers(key, default)}"]))
        assert re.fullmatch(rf"--{key} is .*(nan|inf).*, expected .*a number.*", refused), refused
    for words in (f"--deepspeed.fp16.loss_scale={value}", f"--deepspeed.a={{b: [1, {value}]}}"):
        refused = refusal(partial(load_config, overrides=[words]))
        assert re.match(r"--deepspeed\.[a-z0-9_.]* is -?(nan|inf), expected a number", refused)
    file = write(tmp_path / "c.yaml", f"data: {{mean: [{value}, 0, 0]}}")
    assert refusal(partial(load_config, [file])).startswith(f"{file}: data.mean is ")


OUT_OF_RANGE = {
    ("--run.seed", "-1"): "run.seed is -1, expected a finite number of at least 0",
    ("--run.keep_checkpoints", "0"): "run.keep_checkpoints is 0, expected at least 1",
    ("--run.name", "a/b"): "run.name is 'a/b', expected the name of one folder; run.root says where it lies",
    ("--run.name", ""): "run.name is '', expected the name of one folder; run.root says where it lies",
    ("--data.image_size", "31"): "data.image_size is 31, expected at least 32",
    ("--train.accumulation", "0"): "train.accumulation is 0, expected at least 1",
    (
        "--train.accumulation",
        "3",
    ): "data.global_batch_size is 1024, expected a multiple of 12 (4 ranks x train.accum.*)",
    ("--train.label_smoothing", "1"): "train.label_smoothing is 1.0, expected a number in [0, 1)",
    ("--optimizer.lr", "0"): "optimizer.lr is 0.0, expected a finite number above 0",
    ("--optimizer.betas", "[0.9, 1]"): "optimizer.betas is [0.9, 1.0], expected each a number in [0, 1)",
    ("--schedule.epochs", "5"): "schedule.warmup_epochs is 5.0, expected less than schedule.epochs, 5: .*",
    ("--schedule.min_lr", "1"): "schedule.min_lr is 1.0, expected at most optimizer.lr, 0.001",
    ("--deepspeed.train_batch_size", "1"): "deepspeed.train_batch_size is 1, but .* makes it 1024: leave it out",
}


@pytest.mark.parametrize(("words", "message"), OUT_OF_RANGE.items(), ids=str)
def test_impossible_value_is_refused_in_one_line(words: tuple[str, ...], message: str) -> None:
    config = load_config(overrides=words)
    assert refusal(partial(check_config, config, world_size=4)) == matching(message)


def test_defaults_are_possible() -> None:
    check_config(Config(), world_size=4)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("epochs", "schedule.epochs"),
        ("model.lr", "optimizer.lr"),
        ("data.augment.mixupp", "data.augment.mixup"),
        ("augment", "data.augment"),
        ("xyzzy", None),
    ],
)
def test_nearest_key(key: str, meant: str | None) -> None:
    assert nearest_key(key, config_keys(Config)) == meant


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_possible(path: Path) -> None:
    config = load_config([path])
    check_config(config, world_size=2)
    parse_with_deepspeed(deepspeed_config(config, world_size=2))
    assert config.run.name == path.stem
    assert config.deepspeed["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


def test_every_variant_has_a_recipe() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= set(VARIANTS)
    assert all(load_config([CONFIGS / f"{variant}.yaml"]).model.variant == variant for variant in VARIANTS)


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
POSITIVE = st.integers(1, 10**6)
MODEL_VALUES = {
    "variant": st.sampled_from(sorted(VARIANTS)),
    "num_classes": POSITIVE,
    "in_chans": POSITIVE,
    "drop_rate": st.floats(0, 1, exclude_max=True),
    "drop_path": st.floats(0, 1, exclude_max=True),
    "chunk_lengths": st.none() | st.tuples(*4 * [POSITIVE]),
    "chunk_length": st.integers(1, 10**6),
    "inner_lr": st.floats(0, 1e9),
    "inner_lrs": st.none() | st.tuples(*4 * [st.floats(1e-9, 1e9)]),
    "branch_widths": st.none() | st.tuples(*4 * [POSITIVE]),
    "mup_base": st.just(""),  # which goes with few of the others
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type, whether it makes sense or not."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.tuples(*map(values, get_args(hint)))
    if get_origin(hint) is dict:
        return st.dictionaries(st.text(), YAML_VALUES, max_size=3)
    plain = {int: st.integers(), float: FLOATS, str: st.text(), bool: st.booleans()}
    return plain[hint] if hint in plain else sections(hint)


def sections(section: type) -> st.SearchStrategy[Any]:
    special = MODEL_VALUES if section in (ModelConfig, MemoryConfig) else {}
    hints = get_type_hints(section)
    return st.builds(section, **{name: special[name] if name in special else values(hints[name]) for name in hints})


one_section = st.one_of(st.builds(Config, **{name: values(hint)}) for name, hint in get_type_hints(Config).items())


@settings(max_examples=100, deadline=None)
@given(config=one_section)
def test_saved_configuration_is_read_back(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_config([path]) == config
    assert repr(load_config([path])) == repr(config)  # 1 == 1.0 == True


def test_saved_configuration_names_every_key(tmp_path: Path) -> None:
    save_config(Config(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert all(f"{key.rpartition('.')[2]}:" in text for key in config_keys(Config))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert asdict(load_config([tmp_path / "config.yaml"])) == asdict(Config())


class matching(str):  # noqa: N801 - reads as a word of the assertion
    """Equal to a text that is the same but for what stands in for `.*`, and shows the difference where it isn't."""

    def __eq__(self, other: object) -> bool:
        rest = str(other)
        for part in str(self).split(".*"):
            found = rest.find(part)
            if found < 0:
                return False
            rest = rest[found + len(part) :]
        return "\n" not in str(other)

    __hash__ = str.__hash__


def refusal(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)
