"""Hard negatives for contrastive learning: UnDiMix (UnReMix) weights for the losses that people already use.

embeddings -> a Contrast -> a Weighting -> log-weights -> weighted log-sum over the negatives -> the loss

A training script imports from this module. An adapter imports from `undimix_plugins.toolkit`. To write your own
weighting, import from `undimix_plugins.weightings`.
"""

from importlib.metadata import version

from undimix_plugins.contrast import Contrast, in_batch_negatives, two_views
from undimix_plugins.loss import decoupled, info_nce
from undimix_plugins.methods.active_sampling import ActiveSampling
from undimix_plugins.methods.adco import AdCo
from undimix_plugins.methods.isogclr import ISogCLR
from undimix_plugins.methods.mixing import IMix, UnMix
from undimix_plugins.methods.mmcl import MMCL
from undimix_plugins.monitoring.explain import explain
from undimix_plugins.monitoring.statistics import negative_statistics, watch
from undimix_plugins.monitoring.temperature import cosine_temperature
from undimix_plugins.monitoring.warmup import hardness_share
from undimix_plugins.monitoring.weights import effective_number, importance_weights
from undimix_plugins.plug import undimix
from undimix_plugins.rows import unit_rows
from undimix_plugins.weightings import (
    ADNCE,
    BCL,
    HCL,
    Debiased,
    FalseNegativeAttraction,
    FalseNegativeElimination,
    MoCHi,
    PositiveAware,
    ProGCL,
    Ring,
    SimilarityPenalty,
    UnDiMix,
    Uniform,
    Weighting,
    compose,
    support_set,
)

__version__ = version("undimix-plugins")

__all__ = [
    "ADNCE",
    "BCL",
    "HCL",
    "MMCL",
    "ActiveSampling",
    "AdCo",
    "Contrast",
    "Debiased",
    "FalseNegativeAttraction",
    "FalseNegativeElimination",
    "IMix",
    "ISogCLR",
    "MoCHi",
    "PositiveAware",
    "ProGCL",
    "Ring",
    "SimilarityPenalty",
    "UnDiMix",
    "UnMix",
    "Uniform",
    "Weighting",
    "__version__",
    "compose",
    "cosine_temperature",
    "decoupled",
    "effective_number",
    "explain",
    "hardness_share",
    "importance_weights",
    "in_batch_negatives",
    "info_nce",
    "negative_statistics",
    "support_set",
    "two_views",
    "undimix",
    "unit_rows",
    "watch",
]
