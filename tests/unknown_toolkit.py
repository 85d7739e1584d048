"""A toolkit that the core has never heard of, and an adapter for it, as somebody else would release them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

FILES = {
    "strange_toolkit/__init__.py": "from strange_toolkit.losses import OtherLoss, PairLoss\n",
    "strange_toolkit/losses.py": '''
        import torch
        from torch import nn
        from torch.nn.functional import normalize

        class PairLoss(nn.Module):
            def __init__(self, temperature=0.5):
                super().__init__()
                self.temperature = temperature
                self.projector = nn.Linear(4, 4, bias=False)
                self.scale = nn.Parameter(torch.ones(()))
                self.register_buffer("seen", torch.zeros(()))

            def views(self, first, second):
                self.seen += len(first)
                return [normalize(self.projector(view), dim=1) for view in (first, second)]

            def forward(self, first, second):
                views = torch.cat(self.views(first, second))
                logits = (views @ views.T / self.temperature).fill_diagonal_(-torch.inf)
                labels = torch.arange(len(views)).roll(len(first))
                return self.scale * nn.functional.cross_entropy(logits, labels)

        class OtherLoss(nn.Module):
            """One without negatives."""
    ''',
    "strange_adapter.py": """
        from strange_toolkit import PairLoss
        from undimix_plugins.toolkit import WeightedLoss, info_nce, reweight, two_views

        class WeightedPairLoss(WeightedLoss, PairLoss):
            def forward(self, first, second):
                contrast = two_views(*self.views(first, second), self.temperature)
                return self.scale * info_nce(contrast, self.weighting)

        def weighted(loss, weighting):
            return reweight(loss, weighting, {PairLoss: WeightedPairLoss})
    """,
    # A user's own code, in a package that no adapter is registered for.
    "users_code.py": """
        from strange_toolkit import PairLoss

        class LoudLoss(PairLoss):
            def __init__(self):
                super().__init__(temperature=0.25)
                self.heard = []

            def shout(self):
                return "loud"

        class RewrittenLoss(PairLoss):
            def forward(self, first, second):
                return 2 * super().forward(first, second)
    """,
    "strange_adapter-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: strange-adapter\nVersion: 1.0\n",
    "strange_adapter-1.0.dist-info/entry_points.txt": (
        "[undimix_plugins.adapters]\nstrange_toolkit = strange_adapter:weighted\n"
    ),
}
MODULES = ("strange_toolkit", "strange_toolkit.losses", "strange_adapter", "users_code")


def install(folder: Path) -> None:
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(content))
