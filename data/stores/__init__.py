"""Samples by number, wherever their files lie."""
