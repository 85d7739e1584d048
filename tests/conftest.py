"""Hypothesis as these tests use it: the same examples every time, and no timing."""

from hypothesis import settings

settings.register_profile("undimix", deadline=None, max_examples=25, derandomize=True, print_blob=True)
settings.load_profile("undimix")
