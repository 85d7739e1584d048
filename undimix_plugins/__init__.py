"""Hard negatives for contrastive learning: UnDiMix (UnReMix) weights behind the losses people already use.

embeddings -> a Contrast -> a Weighting -> log-weights -> weighted log-sum over the negatives -> the loss
"""

from undimix_plugins.active_sampling import ActiveSampling, gradient_embeddings, k_means_plus_plus
from undimix_plugins.adco import AdCo
from undimix_plugins.checks import check_embeddings
from undimix_plugins.components import anchor_similarity, diversity, influence
from undimix_plugins.contrast import (
    Contrast,
    Everyone,
    as_full_precision,
    in_batch_negatives,
    same_label,
    two_views,
    unit_rows,
)
from undimix_plugins.distributed import check_equal_batches, gather_constants, gather_parts, processes
from undimix_plugins.explain import Explained, Explanation, explain
from undimix_plugins.last_layer import LastLayer
from undimix_plugins.loss import LogSums, decoupled, info_nce, log_sums, mean_loss, weighted_log_sum
from undimix_plugins.mixing import IMix, Mixed, UnMix
from undimix_plugins.mmcl import MMCL
from undimix_plugins.plug import WeightedLoss, require, reweight, undimix
from undimix_plugins.schedule import hardness_share
from undimix_plugins.statistics import negative_statistics, watch
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
from undimix_plugins.weightings.progcl import ProGCL
from undimix_plugins.weightings.ring import Ring
from undimix_plugins.weightings.similarity_penalty import SimilarityPenalty
from undimix_plugins.weightings.undimix import UnDiMix
from undimix_plugins.weightings.weighting import (
    Uniform,
    Weighting,
    effective_number,
    importance_weights,
    mean_one,
)

__all__ = [
    "BCL",
    "HCL",
    "MMCL",
    "ActiveSampling",
    "AdCo",
    "Contrast",
    "Debiased",
    "Everyone",
    "Explained",
    "Explanation",
    "FalseNegativeAttraction",
    "FalseNegativeElimination",
    "IMix",
    "LastLayer",
    "LogSums",
    "Mixed",
    "MoCHi",
    "ProGCL",
    "Ring",
    "SimilarityPenalty",
    "UnDiMix",
    "UnMix",
    "Uniform",
    "WeightedLoss",
    "Weighting",
    "anchor_similarity",
    "as_full_precision",
    "check_embeddings",
    "check_equal_batches",
    "compose",
    "decoupled",
    "diversity",
    "effective_number",
    "explain",
    "gather_constants",
    "gather_parts",
    "gradient_embeddings",
    "hardness_share",
    "importance_weights",
    "in_batch_negatives",
    "influence",
    "info_nce",
    "k_means_plus_plus",
    "log_sums",
    "mean_loss",
    "mean_one",
    "negative_statistics",
    "processes",
    "require",
    "reweight",
    "same_label",
    "support_set",
    "two_views",
    "undimix",
    "unit_rows",
    "watch",
    "weighted_log_sum",
]
