"""UnDiMix weights for lightly's losses: `undimix(NTXentLoss())`, or the class from here."""

from undimix_plugins import require

require("lightly", extra="lightly")

from undimix_lightly.adapter import weighted  # noqa: E402
from undimix_lightly.dcl_loss import DCLLoss, DCLWLoss  # noqa: E402
from undimix_lightly.detcon_loss import DetConBLoss, DetConSLoss  # noqa: E402
from undimix_lightly.macl_loss import MACLLoss  # noqa: E402
from undimix_lightly.ntx_ent_loss import DirectCLRLoss, NTXentLoss  # noqa: E402

__all__ = ["DCLLoss", "DCLWLoss", "DetConBLoss", "DetConSLoss", "DirectCLRLoss", "MACLLoss", "NTXentLoss", "weighted"]
