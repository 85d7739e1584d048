"""A CLIP of open_clip's own class, small enough to be trained in a test, and real digits with their names."""

from __future__ import annotations

from functools import cache

import open_clip
import torch
from sklearn.datasets import load_digits
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCALE = 5.0  # of the logits, before training


def clip(bias: float | None = None) -> open_clip.CLIP:
    """Returns a new model, whose weights come from torch's seed."""
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg=open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=4, image_size=8),
        text_cfg=open_clip.CLIPTextCfg(context_length=5, vocab_size=49408, width=32, heads=2, layers=1),
        init_logit_scale=float(torch.tensor(SCALE, dtype=torch.float64).log()),
        init_logit_bias=bias,
        output_dict=True,
    )


@cache
def digits(count: int) -> tuple[Tensor, Tensor]:
    """Returns images [count, 3, 8, 8], float64, and the tokens of their names [count, 5]."""
    data = load_digits()
    images = torch.tensor(data.images[:count] / 16)[:, None].expand(-1, 3, -1, -1).contiguous()
    tokenizer = open_clip.SimpleTokenizer(context_length=5)
    return images, tokenizer([NAMES[label] for label in data.target[:count]])
