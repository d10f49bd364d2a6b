"""Checks of the data settings that need nothing but the dataset's manifest and index."""

from math import inf

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import InputError
from convneur.data.stores.choose import open_store


def check_data(config: DataConfig, *, num_classes: int, world_size: int, accumulation: int) -> int:
    """Checks that the settings are possible, fit each other, and fit the data.

    Args:
        config: settings to check.
        num_classes: classes that the model tells apart.
        world_size: ranks.
        accumulation: micro-batches an optimizer step and rank.

    Returns:
        How many steps an epoch has.

    Raises:
        InputError: the first setting that is wrong, and what to do.
    """
    check_values(config)
    if config.engine == "ffcv":
        _check_ffcv(config)
    elif config.decode == "nvjpeg":
        _require_able(config, "data.decode nvjpeg", interpolations=("bilinear", "bicubic"))
    _check_batches(config, world_size, accumulation)
    train = open_store(config, config.train_split)
    open_store(config, config.val_split)
    if len(train.classes) != num_classes:
        raise InputError(
            f"model.num_classes is {num_classes} but {config.root} has {len(train.classes)} classes: "
            f"set model.num_classes to {len(train.classes)}"
        )
    if len(train) < config.global_batch_size:
        raise InputError(
            f"data.global_batch_size is {config.global_batch_size} but {config.root} has only {len(train)} samples in "
            f"split '{config.train_split}': make it smaller"
        )
    return len(train) // config.global_batch_size


def check_values(config: DataConfig) -> None:
    """Checks the settings that can be judged without the dataset; InputError for the first that is impossible."""
    for name in ("image_size", "global_batch_size", "lanes", "window", "repeats", "eval_batch_size"):
        _require(getattr(config, name) >= 1, f"data.{name}", getattr(config, name), "at least 1")
    for name, most in (("image_size", 1 << 16), ("global_batch_size", 10**7), ("workers", 4096)):
        _require(getattr(config, name) <= most, f"data.{name}", getattr(config, name), f"at most {most}")
    _require(config.block >= 0, "data.block", config.block, "at least 0")
    _require(config.subset >= 0, "data.subset", config.subset, "at least 0")
    _require(config.workers >= 0, "data.workers", config.workers, "at least 0")
    _require(0 < config.cache_gb < inf, "data.cache_gb", config.cache_gb, "a finite number above 0")
    _require(config.bad_limit >= 0, "data.bad_limit", config.bad_limit, "at least 0")
    _require(0 < config.eval_crop <= 1, "data.eval_crop", config.eval_crop, "above 0 and at most 1")
    _require(min(config.std) > 0, "data.std", config.std, "above 0")
    _check_augment(config.augment)


def _check_augment(augment: AugmentConfig) -> None:
    (smallest, largest), (narrowest, widest) = augment.scale, augment.ratio
    _require(0 < smallest <= largest <= 1, "data.augment.scale", augment.scale, "a range within 0 (not included) to 1")
    _require(0 < narrowest <= widest, "data.augment.ratio", augment.ratio, "a range above 0")
    for name in ("hflip", "vflip", "erase_prob", "mix_prob", "mix_switch_prob"):
        _require(0 <= getattr(augment, name) <= 1, f"data.augment.{name}", getattr(augment, name), "within 0 to 1")
    for name in ("color_jitter", "mixup", "cutmix"):
        _require(getattr(augment, name) >= 0, f"data.augment.{name}", getattr(augment, name), "at least 0")
    if augment.randaugment:
        _check_randaugment(augment.randaugment)


def _check_randaugment(text: str) -> None:
    from timm.data.auto_augment import rand_augment_transform  # slow to import, and often not needed

    try:
        _require(text.startswith("rand-"), "data.augment.randaugment", text, "like rand-m9-mstd0.5-inc1")
        rand_augment_transform(text, {})
    except (AssertionError, ValueError):
        _require(False, "data.augment.randaugment", text, "like rand-m9-mstd0.5-inc1")


def _check_ffcv(config: DataConfig) -> None:
    """Refuses what FFCV's loader would leave out or do otherwise."""
    _require_able(config, "data.engine ffcv", interpolations=("area",))
    _require(config.format in ("auto", "ffcv"), "data.format", config.format, "'auto' or 'ffcv' with data.engine ffcv")
    _require(config.decode == "cpu", "data.decode", config.decode, "'cpu' with data.engine ffcv, which decodes there")


def _require_able(config: DataConfig, what: str, interpolations: tuple[str, ...]) -> None:
    """Refuses settings that a loader of few abilities would leave out."""
    for name, value, able in (
        ("data.interpolation", config.interpolation, interpolations),
        ("data.augment.randaugment", config.augment.randaugment, ("",)),
        ("data.augment.color_jitter", config.augment.color_jitter, (0,)),
    ):
        expected = " or ".join(repr(one) for one in able)
        _require(value in able, name, value, f"{expected} with {what}, which can do nothing else")


def _check_batches(config: DataConfig, world_size: int, accumulation: int) -> None:
    batch, lanes, readers = config.global_batch_size, config.lanes, world_size * accumulation
    if batch % lanes:
        raise InputError(
            f"data.global_batch_size {batch} is not a multiple of data.lanes {lanes}: change one of the two"
        )
    if lanes % readers:
        raise InputError(
            f"data.lanes {lanes} is not a multiple of {readers} ({world_size} ranks times train.accumulation "
            f"{accumulation}): change one of the three"
        )
    if (config.augment.mixup or config.augment.cutmix) and batch // lanes % 2:
        raise InputError(
            f"data.global_batch_size {batch} / data.lanes {lanes} is odd, but mixup and cutmix need pairs: "
            f"halve data.lanes or set data.augment.mixup and data.augment.cutmix to 0"
        )


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{key} is {value}: it must be {expected}")
