"""From a path to a trained model: the one way for all that look at checkpoints from outside of training."""

from dataclasses import dataclass
from pathlib import Path

import torch

from convneur.checkpoint import CLASSES_FILE, CONFIG_FILE, check_files, find_checkpoint, load_weights, weights_file
from convneur.config import Config, saved_config
from convneur.data.errors import InputError
from convneur.model import ConvNeur


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

    def model(self, device: torch.device | str = "cpu") -> ConvNeur:
        """The model with its weights, in evaluation mode. InputError where they are of another version of it."""
        model = ConvNeur(self.config.model).to(device).eval()
        missing, unknown = model.load_state_dict(load_weights(self.checkpoint, self.averaged), strict=False)
        if missing or unknown:
            raise InputError(
                f"{self.checkpoint} is of another version of {self.config.model.variant}: {len(missing)} parameters are"
                f" missing and {len(unknown)} unknown, such as {[*missing, *unknown][0]}; use the version that wrote it"
            )
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
    check_files(checkpoint, CONFIG_FILE, CLASSES_FILE, weights_file(averaged))
    return Trained(checkpoint, saved_config(checkpoint / CONFIG_FILE), averaged)
