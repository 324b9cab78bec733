"""The documentation; the Python here builds it."""
