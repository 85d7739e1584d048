"""The catalogue of all methods, which `python -m undimix_plugins methods` lists."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

LINE = "one line"  # undimix(loss, weighting)
FOOTER = (
    f'"{LINE}" means undimix(loss, Method()), such as undimix(loss, UnDiMix()).',
    "The scripts, such as lightly_adco.py, are in examples/ of the repository.",
)
TOOLKITS = ("lightly", "sentence-transformers", "PyG", "transformers")


class Method(NamedTuple):
    """A method of the catalogue.

    Attributes:
        name: The name of the class, in `undimix_plugins`, or in the packages of the toolkits that have it.
        source: The arXiv number of the paper.
        does: What the method does to negatives.
        equation: The main equation. s is a similarity, t the temperature, + the positive, j and k are negatives, N is
            their number.
        lightly, sentence_transformers, pyg, transformers: How to use it with this toolkit. "one line" means
            `undimix(loss, weighting)`. Otherwise the kind of interface, with the script in `examples/` that shows it,
            or the reason why the method does not work there.

    Examples:
        >>> from undimix_plugins.methods.catalogue import METHODS
        >>> METHODS[0].name, METHODS[0].source
        ('UnDiMix', '2206.01197')
    """

    name: str
    source: str
    does: str
    equation: str
    lightly: str = LINE
    sentence_transformers: str = LINE
    pyg: str = LINE
    transformers: str = LINE


NO_MOMENTUM = "no, their models have no momentum encoder"
NO_BANK = "no, their losses have no memory bank"
NO_MIXTURE = "no, their inputs cannot be mixed"
OF_IMAGES = "no, it is made of pixels"

METHODS = (
    Method(
        "UnDiMix",
        "2206.01197",
        "weights by similarity, influence and diversity",
        "w_j = mean-one exp(h (l_A A_j + l_I I_j + l_V V_j))",
    ),
    Method(
        "Debiased",
        "2007.00224",
        "corrects the negatives' sum for negatives of the anchor's class",
        "max((sum_j e^(s_j/t) - tau_plus N e^(s+/t)) / (1 - tau_plus), N e^(-1/t))",
    ),
    Method(
        "HCL",
        "2010.04592",
        "weights by an exponential of similarity, debiased; with alpha it is HN-NCE (2301.02280)",
        "w_j = mean-one e^(beta s_j/t); alpha e^(s+/t) in the denominator",
    ),
    Method(
        "ADNCE",
        "2310.11048",
        "weights by a Gaussian of similarity, without gradient",
        "w_j = mean-one e^(-(s_j - mu)^2 / (2 sigma^2))",
    ),
    Method(
        "Ring",
        "2010.02037",
        "keeps the negatives between two percentiles of similarity",
        "w_j = 1 if lower <= percentile of s_j <= upper, else 0",
    ),
    Method(
        "BCL",
        "2301.11673",
        "weights by the probability of a true and hard negative, given its rank",
        "w_j = hard_j / ((1 - tau_plus) true_j + tau_plus false_j)",
    ),
    Method(
        "ProGCL",
        "2110.02027",
        "weights by the probability of a true negative, from a mixture model of similarities",
        "w_j = mean-one p_j (1 + s_j) / 2",
    ),
    Method(
        "SimilarityPenalty",
        "2503.04812",
        "adds a multiple of the detached similarity to the logit, of all negatives or a scope of them",
        "w_j = e^(alpha s_j)",
    ),
    Method(
        "PositiveAware",
        "2506.05176",
        "leaves out negatives too similar to the anchor, compared with its positive",
        "w_j = 0 if s_j > s+ - margin, or s_j > s+ - margin |s+|",
    ),
    Method(
        "FalseNegativeElimination",
        "2011.11765",
        "leaves out likely false negatives, found by a support set",
        "w_j = 0 for the k of most max_v <v, v_j> > threshold",
    ),
    Method(
        "FalseNegativeAttraction",
        "2011.11765",
        "turns likely false negatives into positives",
        "mean over p in {+} and F of -log(e^(s_p/t) / Z)",
        lightly="one line; not DCLWLoss, MACLLoss or a weight_fn",
        sentence_transformers="one line; not joint directions or guides",
    ),
    Method(
        "MoCHi",
        "2010.01028",
        "adds negatives mixed from the hardest and from the anchor",
        "+ sum_k e^(<q, h_k>/t), h_k ~ a n_i + (1 - a) n_j and b q + (1 - b) n_j",
    ),
    Method(
        "AdCo",
        "2011.08435",
        "learns a pool of negatives that make the loss large",
        "r_j += lr d loss / d r_j, n_j = r_j / |r_j|",
        lightly="a loss and its step (lightly_adco.py)",
        sentence_transformers=NO_MOMENTUM,
        pyg=NO_MOMENTUM,
        transformers=NO_MOMENTUM,
    ),
    Method(
        "MMCL",
        "2112.11450",
        "replaces the softmax by an SVM for each anchor, and weights by its dual variables",
        "min over 0 <= a <= C of a' D a / 2 - 2 * 1'a",
        lightly="a loss (lightly_mmcl.py)",
        sentence_transformers="no, its losses are called with texts",
        pyg="a loss of a model's two views",
        transformers="a compute_loss_func of two views' rows",
    ),
    Method(
        "ISogCLR",
        "2305.11965",
        "learns a temperature for each sample, and weights by the softmax at that temperature",
        "tau_i log(mean_j e^((s_j - s+)/tau_i)) + rho tau_i",
        lightly="a loss, with each image's index (lightly_isogclr.py)",
        sentence_transformers="a loss of your own around it, with the index as label; not in checkpoints",
        pyg="a loss of a model's two views, with an index in the data",
        transformers="a compute_loss_func of two views' rows, with the index as label",
    ),
    Method(
        "TemperatureSchedule",
        "2303.13664",
        "weights none: moves the temperature up and down along a cosine",
        "t = (high - low) (1 + cos(2 pi time / period)) / 2 + low",
        lightly="a callback (lightly_temperature.py)",
        sentence_transformers="a callback",
        pyg="a function for your loop, cosine_temperature",
        transformers="a callback; not for ImageTextLoss, whose model learns the temperature",
    ),
    Method(
        "ActiveSampling",
        "2009.09805",
        "fills a memory bank with uncertain and diverse embeddings",
        "k-means++ of the gradients d l(pseudo label) / d W",
        lightly="what to enqueue (lightly_active_sampling.py)",
        sentence_transformers=NO_BANK,
        pyg=NO_BANK,
        transformers=NO_BANK,
    ),
    Method(
        "IMix",
        "2010.08887",
        "mixes inputs, and the labels that say which key is the positive",
        "lam l(q', own) + (1 - lam) l(q', other)",
        lightly="a transform and a loss (lightly_imix.py)",
        sentence_transformers=NO_MIXTURE,
        pyg=NO_MIXTURE,
        transformers=NO_MIXTURE,
    ),
    Method(
        "UnMix",
        "2003.05438",
        "mixes a batch with itself reversed, for two further losses",
        "L(q, k) + lam L(q', k) + (1 - lam) L(q' reversed, k)",
        lightly="a transform and a loss (lightly_unmix.py)",
        sentence_transformers=NO_MIXTURE,
        pyg=NO_MIXTURE,
        transformers=NO_MIXTURE,
    ),
    Method(
        "NonSemanticNegatives",
        "2110.14189",
        "adds each image's own patches or texture",
        "+ sum_k e^(alpha <q, n_k>/t), n_k of the anchor's own image",
        lightly="a transform and a weighting (lightly_non_semantic.py)",
        sentence_transformers=OF_IMAGES,
        pyg=OF_IMAGES,
        transformers=OF_IMAGES,
    ),
    Method(
        "ANCE",
        "2007.00808",
        "mines hard negatives in the whole corpus, in the background, again and again",
        "D- = top of f_k(q) . f_k(corpus), less q's positives",
        lightly="no, there is no corpus of texts",
        sentence_transformers="a callback (sentence_transformers_ance.py)",
        pyg="no, there is no corpus of texts",
        transformers="no, the plain Trainer retrieves no texts",
    ),
)


def places(method: Method) -> list[str]:
    """Returns in which toolkits a method works and how, with a line for each group of toolkits.

    Args:
        method: A method of the catalogue.

    Returns:
        The lines.

    Examples:
        >>> from undimix_plugins.methods.catalogue import METHODS, places
        >>> places(METHODS[0])
        ['everywhere: one line']
    """
    toolkits: dict[str, list[str]] = {}
    for toolkit, where in zip(TOOLKITS, method[4:], strict=True):
        toolkits.setdefault(where, []).append(toolkit)
    if len(toolkits) == 1:
        return [f"everywhere: {where}" for where in toolkits]
    return [f"{', '.join(names)}: {where}" for where, names in toolkits.items()]


def table(width: int | None = None) -> str:
    """Returns the methods as text.

    Args:
        width: The width of lines in characters. None for no limit.

    Returns:
        The text, with a paragraph for each method, and one that says how to use them.

    Examples:
        >>> print(table().splitlines()[0])
        UnDiMix, arXiv 2206.01197: weights by similarity, influence and diversity
    """
    paragraphs = []
    for method in METHODS:
        lines = [f"{method.name}, arXiv {method.source}: {method.does}", method.equation, *places(method)]
        if width is not None:
            lines = [textwrap.fill(line, width - 4, subsequent_indent="    ") for line in lines]
        paragraphs.append("\n    ".join(lines))
    footer = FOOTER if width is None else [textwrap.fill(line, width) for line in FOOTER]
    return "\n\n".join([*paragraphs, "\n".join(footer)])


def markdown() -> str:
    """Returns the methods as a Markdown table, for the manual.

    Examples:
        >>> print(markdown().splitlines()[0])
        | method | source | what it does to negatives | where |
    """
    rows = ["| method | source | what it does to negatives | where |", "|---|---|---|---|"]
    for method in METHODS:
        source = f"[{method.source}](https://arxiv.org/abs/{method.source})"
        rows.append(f"| `{method.name}` | {source} | {method.does} | {'; '.join(places(method))} |")
    return "\n".join(rows) + "\n"
