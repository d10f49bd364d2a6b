"""A run: put together, in progress, and resumed."""
