"""From encoded bytes to the pixels that the model sees."""
