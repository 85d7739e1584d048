"""UnDiMix weights for lightly's losses: use `undimix(NTXentLoss())`, or a class of this package."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from undimix_plugins.toolkit import require

require("lightly", extra="lightly")

from lightly import loss as host  # noqa: E402

from undimix_lightly.adapter import weighted  # noqa: E402
from undimix_lightly.dcl_loss import DCLLoss, DCLWLoss  # noqa: E402
from undimix_lightly.detcon_loss import DetConBLoss, DetConSLoss  # noqa: E402
from undimix_lightly.macl_loss import MACLLoss  # noqa: E402
from undimix_lightly.non_semantic import (  # noqa: E402
    NonSemanticNegatives,
    NonSemanticTransform,
    non_semantic_columns,
)
from undimix_lightly.ntx_ent_loss import NTXentLoss  # noqa: E402

if TYPE_CHECKING:
    from undimix_lightly.callbacks import (
        HardnessWarmup,
        MemoryBankCheckpoint,
        NegativeStatistics,
        TemperatureSchedule,
    )

CALLBACKS = ("HardnessWarmup", "MemoryBankCheckpoint", "NegativeStatistics", "TemperatureSchedule")

__all__ = [
    "DCLLoss",
    "DCLWLoss",
    "DetConBLoss",
    "DetConSLoss",
    "DirectCLRLoss",
    "HardnessWarmup",
    "MACLLoss",
    "MemoryBankCheckpoint",
    "NTXentLoss",
    "NegativeStatistics",
    "NonSemanticNegatives",
    "NonSemanticTransform",
    "TemperatureSchedule",
    "non_semantic_columns",
    "weighted",
]
if hasattr(host, "DirectCLRLoss"):  # from 1.5.23 on
    from undimix_lightly.directclr_loss import DirectCLRLoss
else:
    __all__.remove("DirectCLRLoss")


def __getattr__(name: str) -> Any:
    # pytorch_lightning takes seconds to import, and many loops do without it.
    if name in CALLBACKS:
        return getattr(importlib.import_module("undimix_lightly.callbacks"), name)
    if name == "DirectCLRLoss":
        raise ImportError(f"DirectCLRLoss: expected lightly 1.5.23 or newer, which has it, got {version('lightly')}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
