"""From image files to the batches of an optimizer step; imports nothing from the other rooms."""
