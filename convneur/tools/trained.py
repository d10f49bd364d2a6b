"""From a path to a trained model: the one way for all that look at checkpoints from outside of training."""

from dataclasses import dataclass
from pathlib import Path

import torch

from convneur.config import Config, saved_config
from convneur.data.errors import InputError
from convneur.models.backbone import Model
from convneur.records.checkpoint import load_weights, weights_files
from convneur.records.folder import CLASSES_FILE, CONFIG_FILE
from convneur.records.listing import find_checkpoint
from convneur.records.manifest import check_files
from convneur.tasks.choose import build_task

_NONE = torch.empty(0, device="meta")  # of a shape that no parameter has


@dataclass(frozen=True)
class Trained:
    """A checkpoint whose files are as they were written.

    Attributes:
        checkpoint: its folder.
        config: the run's configuration.
        averaged: whether it is about the averaged weights.
    """

    checkpoint: Path
    config: Config
    averaged: bool

    def model(self, device: torch.device | str = "cpu", *, mapped: bool = False) -> Model:
        """The task's model with its weights, in evaluation mode.

        Args:
            device: where it is to be.
            mapped: whether its weights are mapped from the file instead of copied, which saves memory on a CPU.

        Raises:
            InputError: the weights are of another version of the model.
        """
        task = build_task(self.config, torch.device("cpu"))
        with torch.device("meta" if mapped else device):
            model = task.build_model().eval()
        weights = load_weights(self.checkpoint, self.averaged)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        odd = [name for name in shapes.keys() | weights.keys() if weights.get(name, _NONE).shape != shapes.get(name)]
        if odd:
            raise InputError(
                f"{self.checkpoint} is of another version of {self.config.model.variant}: {len(odd)} parameters are"
                f" missing, unknown or of another shape, such as {min(odd)}; use the version that wrote it"
            )
        model.load_state_dict(weights, assign=mapped)
        return model


def open_trained(path: Path, averaged: bool = False) -> Trained:
    """Finds a checkpoint, and compares what is to be read of it with what was written, byte by byte.

    Args:
        path: folder of the checkpoint, or of a run, whose newest is taken.
        averaged: whether to take the averaged weights.

    Raises:
        InputError: there is no checkpoint, or one of these files is damaged.
    """
    checkpoint = find_checkpoint(path)
    check_files(checkpoint, CONFIG_FILE, CLASSES_FILE, *weights_files(averaged))
    return Trained(checkpoint, saved_config(checkpoint / CONFIG_FILE), averaged)
