"""UnDiMix weights for lightly's losses: `undimix(NTXentLoss())`, or the class from here."""

from undimix_plugins import require

require("lightly", extra="lightly")

from undimix_lightly.ntx_ent_loss import NTXentLoss, weighted  # noqa: E402

__all__ = ["NTXentLoss", "weighted"]
