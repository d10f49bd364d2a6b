"""From the files that others publish to a dataset."""
