"""Imports stable-pretraining where it is installed. It sets up logging for the whole process, which is put back."""

import logging

from tests.releases import is_installed

if is_installed("stable-pretraining"):
    handlers, level = list(logging.root.handlers), logging.root.level
    import stable_pretraining.losses  # noqa: F401

    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
