"""What an adapter imports: the base class of weighted losses, contrasts, losses, input checks and gathering.

An adapter is a package for one toolkit. It defines a subclass of `WeightedLoss` for each of the toolkit's losses. It
registers one function under the entry-point group `undimix_plugins.adapters`, which usually only calls `reweight`.
"""

from undimix_plugins.checks import (
    check_choice,
    check_columns,
    check_embeddings,
    check_labels,
    check_number,
    check_same_length,
    check_strength,
    check_temperature,
    values_are_free,
)
from undimix_plugins.contrast import (
    Contrast,
    ExcludedMask,
    GatheredPool,
    LastLayerInputs,
    in_batch_negatives,
    same_label,
    two_views,
)
from undimix_plugins.distributed import check_equal_batches, gather_constants, gather_parts, processes
from undimix_plugins.last_layer import LastLayer
from undimix_plugins.loss import decoupled, info_nce, info_nce_both_ways, log_sums, mean_loss
from undimix_plugins.monitoring.statistics import mean_statistics, negative_statistics, watch
from undimix_plugins.monitoring.temperature import (
    TemperatureCycle,
    losses_with_temperature,
    set_temperature,
)
from undimix_plugins.monitoring.warmup import check_warmup, hardness_share, set_hardness, weighted_losses
from undimix_plugins.rows import as_full_precision, full_precision, to_length_one, unit_rows
from undimix_plugins.scoped import Scoped
from undimix_plugins.settings import constant
from undimix_plugins.sums import LogSums, weighted_log_sum
from undimix_plugins.views import contrast_of_views
from undimix_plugins.weighted_loss import (
    WeightedLoss,
    around,
    chosen_weighting,
    joined_class,
    release,
    require,
    reweight,
    with_parts,
)
from undimix_plugins.weightings.weighting import Weighting

__all__ = [
    "Contrast",
    "ExcludedMask",
    "GatheredPool",
    "LastLayer",
    "LastLayerInputs",
    "LogSums",
    "Scoped",
    "TemperatureCycle",
    "WeightedLoss",
    "Weighting",
    "around",
    "as_full_precision",
    "check_choice",
    "check_columns",
    "check_embeddings",
    "check_equal_batches",
    "check_labels",
    "check_number",
    "check_same_length",
    "check_strength",
    "check_temperature",
    "check_warmup",
    "chosen_weighting",
    "constant",
    "contrast_of_views",
    "decoupled",
    "full_precision",
    "gather_constants",
    "gather_parts",
    "hardness_share",
    "in_batch_negatives",
    "info_nce",
    "info_nce_both_ways",
    "joined_class",
    "log_sums",
    "losses_with_temperature",
    "mean_loss",
    "mean_statistics",
    "negative_statistics",
    "processes",
    "release",
    "require",
    "reweight",
    "same_label",
    "set_hardness",
    "set_temperature",
    "to_length_one",
    "two_views",
    "unit_rows",
    "values_are_free",
    "watch",
    "weighted_log_sum",
    "weighted_losses",
    "with_parts",
]
