"""What can go wrong in training; bad input is `convneur.data.errors.InputError`."""


class TrainingError(Exception):
    """A run can't go on. Checkpoints that exist are from before that."""


class NonFiniteError(TrainingError):
    """Gradients, losses or weights are not what they should be, time and again: NaN, infinite or far too high."""


class SaveError(TrainingError):
    """A checkpoint couldn't be written, on all ranks alike. Those that exist are as they were."""


class CorruptionError(TrainingError):
    """Ranks hold different values of what should be the same."""
