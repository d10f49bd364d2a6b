"""Backbones: what one promises, how one is built, and what it costs."""
