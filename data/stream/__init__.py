"""Samples in the order of training and evaluation, in batches."""
