"""DeepSpeed around a model: all that knows its names stands here."""
