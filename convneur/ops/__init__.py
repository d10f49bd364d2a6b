"""Functions of tensors: they know no configuration and no module of the model."""
