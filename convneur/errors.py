"""What can go wrong in training; bad input is `convneur.data.errors.InputError`."""


class NonFiniteError(Exception):
    """The loss or the weights became NaN or infinite. Checkpoints that exist are from before that."""


class SaveError(Exception):
    """A checkpoint couldn't be written, on all ranks alike. Those that exist are as they were."""
