"""What is checked before a run is started or submitted: nothing has been allocated or written by then."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convneur.engine.config import checked_steps
from convneur.launch.imports import importing

if TYPE_CHECKING:
    from convneur.config import Config


def check_start(config: "Config", world_size: int) -> None:
    """Refuses, where no run is to start yet, all that its start will: what `check` does, and the initial weights."""
    check(config, world_size)
    import torch

    from convneur.models.build import check_initial
    from convneur.ops import native
    from convneur.run.trainer import initial_model
    from convneur.tasks.choose import build_task

    task = build_task(config, torch.device("cpu"))
    with native.unused():
        check_initial(initial_model(task, config.run.seed), config.model, config.data.image_size)


def check(config: "Config", world_size: int) -> None:
    """Holds a configuration against the data, the ranks and DeepSpeed; InputError where they don't go together."""
    with importing():
        from convneur.config import deepspeed_config
        from convneur.data.check import check_data
        from convneur.engine.section import parse_with_deepspeed
        from convneur.limits import check_config
        from convneur.system.world import name_accelerator

        name_accelerator()
    check_config(config, world_size)
    steps_per_epoch = check_data(
        config.data,
        num_classes=config.model.num_classes,
        world_size=world_size,
        accumulation=config.train.accumulation,
    )
    checked_steps(config.schedule, steps_per_epoch)
    with importing():  # DeepSpeed
        parse_with_deepspeed(deepspeed_config(config, world_size))


def check_beginnings(configs: "Sequence[Config]", begin: str) -> None:
    """Raises InputError where runs can't begin as asked, or have begun otherwise."""
    from convneur.system.world import name_accelerator

    name_accelerator()
    from convneur.run.resume import check_beginning

    for config in configs:
        check_beginning(Path(config.run.root) / config.run.name, begin)
