"""The weightings, one class for each method, and what you need to write your own."""

from undimix_plugins.masked import mean_one
from undimix_plugins.weightings.adnce import ADNCE
from undimix_plugins.weightings.bcl import BCL
from undimix_plugins.weightings.compose import compose
from undimix_plugins.weightings.debiased import Debiased
from undimix_plugins.weightings.false_negatives import (
    FalseNegativeAttraction,
    FalseNegativeElimination,
    support_set,
)
from undimix_plugins.weightings.hcl import HCL
from undimix_plugins.weightings.mochi import MoCHi
from undimix_plugins.weightings.positive_aware import PositiveAware
from undimix_plugins.weightings.progcl import ProGCL
from undimix_plugins.weightings.ring import Ring
from undimix_plugins.weightings.similarity_penalty import SimilarityPenalty
from undimix_plugins.weightings.undimix import UnDiMix
from undimix_plugins.weightings.weighting import EqualWeights, Terms, Uniform, Weighting

__all__ = [
    "ADNCE",
    "BCL",
    "HCL",
    "Debiased",
    "EqualWeights",
    "FalseNegativeAttraction",
    "FalseNegativeElimination",
    "MoCHi",
    "PositiveAware",
    "ProGCL",
    "Ring",
    "SimilarityPenalty",
    "Terms",
    "UnDiMix",
    "Uniform",
    "Weighting",
    "compose",
    "mean_one",
    "support_set",
]
