"""Trainings in the toolkits' own loops. With an old sentence-transformers, its modules get their present names.

Here, because the processes that a test starts import this package, too.
"""

import sys
from importlib import import_module

from tests.releases import is_older

# The names from 5.4 on, and before.
MOVED = {
    "sentence_transformer": "",
    "sentence_transformer.losses": "losses",
    "sentence_transformer.modules": "models",
    "sentence_transformer.evaluation": "evaluation",
    "sentence_transformer.training_args": "training_args",
    "sparse_encoder.modules": "sparse_encoder.models",
}

if is_older("sentence-transformers", "5.4"):
    for now, before in MOVED.items():
        module = import_module(f"sentence_transformers.{before}".rstrip("."))
        sys.modules[f"sentence_transformers.{now}"] = module
        parent, _, name = now.rpartition(".")
        setattr(import_module(f"sentence_transformers.{parent}".rstrip(".")), name, module)
