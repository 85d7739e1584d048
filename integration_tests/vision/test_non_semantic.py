"""Non-semantic images are made of their image's own pixels, and the loss with them is the authors' objective."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from lightly.loss import DCLLoss, NTXentLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torchvision import transforms

from undimix_lightly.non_semantic import (
    NonSemanticNegatives,
    NonSemanticTransform,
    _before_cut,
    non_semantic_columns,
)
from undimix_plugins import (
    HCL,
    Contrast,
    FalseNegativeElimination,
    UnDiMix,
    Uniform,
    compose,
    info_nce,
    two_views,
    undimix,
)
from undimix_plugins.toolkit import log_sums

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def numbered(n: int, height: int, width: int) -> Tensor:
    """Images whose pixels say where they are."""
    return torch.arange(n * height * width).reshape(n, 1, height, width)


def places(made: Tensor, height: int, width: int) -> Tensor:
    """Of each pixel of images made of numbered ones, its image, row and column there [n, 3, height, width]."""
    image, place = made[:, 0] // (height * width), made[:, 0] % (height * width)
    return torch.stack([image, place // width, place % width], dim=1)


def is_tiled(place: Tensor, size: int) -> bool:
    """Whether an image [3, height, width] is tiled by patches of this size, each as it stands in the source."""
    height, width = place.shape[1:]
    for top, left in itertools.product(range(0, height, size), range(0, width, size)):
        corner = place[1:, top, left].tolist()
        if corner[0] + size > height or corner[1] + size > width:
            return False
        for y in range(top, min(top + size, height)):
            for x in range(left, min(left + size, width)):
                if place[1:, y, x].tolist() != [corner[0] + y - top, corner[1] + x - left]:
                    return False
    return True


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(28, 28, range(2, 10)), (32, 40, range(2, 11)), (9, 7, range(1, 3)), (4, 4, [1])]
)
def test_patches_tile_the_image(height: int, width: int, expected: range | list[int]) -> None:
    """One size of patch for an image, all sizes of the scaled range, from anywhere in the image itself."""
    torch.manual_seed(0)
    n = 60
    place = places(NonSemanticTransform("patch")(numbered(n, height, width)), height, width)
    assert torch.equal(place[:, 0], torch.arange(n)[:, None, None].expand(n, height, width))
    sizes = []
    for image in place:
        fitting = [size for size in expected if is_tiled(image, size)]
        assert fitting
        sizes.append(max(fitting))
    assert set(sizes) == set(expected)
    seen = place[:, 1:].permute(1, 0, 2, 3).flatten(1)
    assert seen.amin(dim=1).tolist() == [0, 0]
    assert seen.amax(dim=1).tolist() == [height - 1, width - 1]


def test_patch_sizes_are_the_papers_in_its_images() -> None:
    torch.manual_seed(0)
    transform = NonSemanticTransform("patch", patch_size=(16, 17))
    place = places(transform(numbered(6, 224, 224)), 224, 224)
    fitting = [[size for size in range(14, 20) if is_tiled(image, size)] for image in place]
    assert {size for sizes in fitting for size in sizes} == {16, 17}
    assert all(len(sizes) == 1 for sizes in fitting)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (64, 50), (28, 28)])
def test_textures_keep_neighbours_and_no_layout(height: int, width: int) -> None:
    """Most neighbours are neighbours in the image, hardly a pixel is where it was, all are from two pieces."""
    torch.manual_seed(0)
    n = 20
    place = places(NonSemanticTransform("texture")(numbered(n, height, width)), height, width)
    assert torch.equal(place[:, 0], torch.arange(n)[:, None, None].expand(n, height, width))
    right = (place[:, 1:, :, 1:] - place[:, 1:, :, :-1] == torch.tensor([0, 1])[:, None, None]).all(dim=1)
    below = (place[:, 1:, 1:] - place[:, 1:, :-1] == torch.tensor([1, 0])[:, None, None]).all(dim=1)
    assert right.double().mean() > 0.6
    assert below.double().mean() > 0.6
    stayed = (place[:, 1] == torch.arange(height)[:, None]) & (place[:, 2] == torch.arange(width))
    assert stayed.double().mean() < 0.05
    side = max(3, round(96 * min(height, width) / 224))
    for image in place:
        outside = [
            (image[i] < (length - side) // 2) | (image[i] >= (length - side) // 2 + side)
            for i, length in ((1, height), (2, width))
        ]
        elsewhere = image[1:, outside[0] | outside[1]]  # than in the centre: in another piece of that size
        if elsewhere.numel():
            assert (elsewhere.amax(dim=1) - elsewhere.amin(dim=1) < side).all()


def test_textures_differ_from_block_to_block_less_than_chance() -> None:
    """Of smooth images the seams are smoother than those of patches, since what fits is laid and then cut."""
    torch.manual_seed(0)
    small = torch.rand(30, 1, 6, 6)
    transforms_of_32 = {kind: NonSemanticTransform(kind, (32, 32)) for kind in ("patch", "texture")}
    smooth = torch.nn.functional.interpolate(small, 64, mode="bicubic")
    roughness = {kind: made(smooth).diff(dim=3).abs().mean() for kind, made in transforms_of_32.items()}
    assert roughness["texture"] < roughness["patch"]


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_cut_is_the_least_of_all(length: int, overlap: int) -> None:
    errors = rows(4, length, overlap, seed=length).detach().abs()
    marks = _before_cut(errors)
    for error, before in zip(errors, marks, strict=True):
        cuts = [
            cut
            for cut in itertools.product(range(overlap), repeat=length)
            if all(abs(one - other) <= 1 for one, other in itertools.pairwise(cut))
        ]
        least = min(cuts, key=lambda cut: sum(float(error[i, j]) for i, j in enumerate(cut)))
        assert before.tolist() == [[j < least[i] for j in range(overlap)] for i in range(length)]


@pytest.mark.parametrize("kind", ["patch", "texture"])
def test_transform_is_as_torchvisions_are(kind: str) -> None:
    transform = transforms.Compose([transforms.ToTensor(), NonSemanticTransform(kind)])
    image = transforms.ToPILImage()(torch.rand(3, 20, 24))
    torch.manual_seed(3)
    one = transform(image)
    torch.manual_seed(3)
    assert torch.equal(one, transform(image))
    assert not torch.equal(one, transform(image))
    assert one.shape == (3, 20, 24)
    assert one.dtype == torch.float32
    for dtype in (torch.uint8, torch.float16, torch.float64):
        batch = (100 * torch.rand(2, 3, 9, 11)).to(dtype)
        made = NonSemanticTransform(kind)(batch)
        assert made.shape == batch.shape
        assert made.dtype == dtype
        colours = [{tuple(pixel) for pixel in part.flatten(1).T.tolist()} for part in (*made, *batch)]
        assert colours[0] <= colours[2]
        assert colours[1] <= colours[3]
    assert repr(NonSemanticTransform(kind)).startswith(f"NonSemanticTransform(kind='{kind}'")


def authors(q: Tensor, k: Tensor, queue: Tensor, further: list[Tensor], t: float, alpha: float) -> Tensor:
    """Cross entropy of the logits that the authors put side by side, one query at a time."""
    q, k, *further = (normalize(part, dim=1) for part in (q, k, *further))
    losses = []
    for i in range(len(q)):
        logits = [q[i] @ k[i], *(q[i] @ entry for entry in queue), *(alpha * (q[i] @ part[i]) for part in further)]
        losses.append(cross_entropy(torch.stack(logits)[None] / t, torch.tensor([0])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("number", [1, 3, 10])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_with_a_bank_it_is_the_authors_loss(n: int, number: int, alpha: float) -> None:
    host = NTXentLoss(temperature=0.2, memory_bank_size=(9, 6)).double()
    criterion = undimix(host, NonSemanticNegatives(alpha))
    queue = host.memory_bank.bank.clone()
    q, k, *further = (rows(n, 6, seed=seed) for seed in range(2 + number))
    expected = authors(q, k, queue, further, 0.2, alpha)
    with non_semantic_columns(*further):
        ours = criterion(q, k)
    torch.testing.assert_close(ours, expected, **EXACT)
    gradients = torch.autograd.grad(ours, [q, *further])
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [q, *further]), **EXACT)


def slow_two_views(z0: Tensor, z1: Tensor, further: list[Tensor], t: float, alpha: float, *, decoupled: bool) -> Tensor:
    views = normalize(torch.cat([z0, z1]), dim=1)
    n, losses = len(z0), []
    for i in range(2 * n):
        other = (i + n) % (2 * n)
        positive = (views[i] @ views[other] / t).exp()
        total = sum((views[i] @ views[j] / t).exp() for j in range(2 * n) if j not in (i, other))
        total = total + sum((alpha * (views[i] @ normalize(part[i % n], dim=0)) / t).exp() for part in further)
        losses.append(-(positive / (total if decoupled else positive + total)).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("host", [NTXentLoss(temperature=0.3), DCLLoss(temperature=0.3)], ids=["NTXent", "DCL"])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_of_two_views(n: int, host: torch.nn.Module) -> None:
    """Both views of a sample get its columns."""
    batch = z0, z1, *further = [rows(n, 5, seed=seed) for seed in range(4)]
    expected = slow_two_views(z0, z1, further, 0.3, 2.0, decoupled=isinstance(host, DCLLoss))
    with non_semantic_columns(*further):
        ours = undimix(host, NonSemanticNegatives(alpha=2.0))(z0, z1)
    torch.testing.assert_close(ours, expected, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(ours, batch), torch.autograd.grad(expected, batch), **EXACT)


@pytest.mark.parametrize("bank", [False, True], ids=["two views", "bank"])
def test_gradcheck_with_a_learned_temperature(bank: bool) -> None:
    z0, z1, further = (rows(3, 4, seed=seed) for seed in range(3))
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    entries = rows(5, 4, seed=8).detach()

    def loss(z0: Tensor, z1: Tensor, further: Tensor, t: Tensor) -> Tensor:
        z0, z1 = normalize(z0, dim=1), normalize(z1, dim=1)
        contrast = Contrast.of(z0, z1, entries, None, t) if bank else two_views(z0, z1, t)
        with non_semantic_columns(further):
            return info_nce(contrast, NonSemanticNegatives(alpha=1.5))

    assert torch.autograd.gradcheck(loss, (z0, z1, further, t))


@pytest.mark.parametrize("other", [UnDiMix(), HCL(1.0, 0.1), FalseNegativeElimination(k=2, threshold=0.0)], ids=repr)
@pytest.mark.parametrize("bank", [False, True], ids=["two views", "bank"])
def test_beside_another_weighting(bank: bool, other: UnDiMix) -> None:
    """Columns add their exponentials to what the other method makes of the negatives."""
    z0, z1, further = (normalize(rows(6, 5, seed=seed), dim=1) for seed in range(3))
    contrast = Contrast.of(z0, z1, rows(9, 5, seed=8).detach(), None, 0.3) if bank else two_views(z0, z1, 0.3)
    alone = log_sums(contrast, other)
    with non_semantic_columns(further):
        both = log_sums(contrast, compose(other, NonSemanticNegatives(alpha=2.0)))
    own = torch.stack([(2.0 * (a @ further[i % 6]) / 0.3).exp() for i, a in enumerate(contrast.anchors)])
    torch.testing.assert_close(both.positives, alone.positives, **EXACT)
    torch.testing.assert_close(both.negatives, (alone.negatives.exp() + own).log(), **EXACT)


def test_embeddings_without_gradient_are_constants() -> None:
    z0, z1, further = (rows(4, 5, seed=seed) for seed in range(3))
    criterion = undimix(NTXentLoss(), NonSemanticNegatives())
    with torch.no_grad():
        encoded = 2 * further
    with non_semantic_columns(encoded):
        criterion(z0, z1).backward()
    assert further.grad is None
    assert z0.grad is not None


def test_low_temperature_in_float32() -> None:
    z0, z1, further = (rows(8, 5, seed=seed) for seed in range(3))
    expected = slow_two_views(z0, z1, [further], 0.02, 3.0, decoupled=False)
    with non_semantic_columns(further.float()):
        ours = undimix(NTXentLoss(temperature=0.02), NonSemanticNegatives(alpha=3.0))(z0.float(), z1.float())
    assert ours.dtype == torch.float32
    bound = 16 * torch.finfo(torch.float32).eps / 0.02
    torch.testing.assert_close(ours.double(), expected, rtol=bound, atol=bound)


def test_half_precision_embeddings() -> None:
    z0, z1, further = (rows(8, 5, seed=seed).half() for seed in range(3))
    expected = slow_two_views(z0.double(), z1.double(), [further.double()], 0.2, 1.0, decoupled=False)
    with non_semantic_columns(further):
        ours = undimix(NTXentLoss(temperature=0.2), NonSemanticNegatives())(z0, z1)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_pair_without_other_negatives() -> None:
    """An anchor without negatives gets no columns either, as the class says."""
    z0, z1, further = (rows(1, 5, seed=seed) for seed in range(3))
    with non_semantic_columns(further):
        loss = undimix(NTXentLoss(), NonSemanticNegatives())(z0, z1)
    assert loss == 0
    assert torch.autograd.grad(loss, z0)[0].isfinite().all()


def test_warmed_up_it_starts_plain_and_ends_whole() -> None:
    z0, z1, further = (normalize(rows(6, 5, seed=seed), dim=1) for seed in range(3))
    contrast = two_views(z0, z1, 0.3)
    with non_semantic_columns(further):
        losses = [info_nce(contrast, NonSemanticNegatives(2.0).softened(share)) for share in (0, 0.3, 0.7, 1)]
        whole = info_nce(contrast, NonSemanticNegatives(2.0))
    assert losses == sorted(losses)
    assert losses[0] == info_nce(contrast, Uniform())
    assert losses[-1] == whole


def test_columns_are_those_of_the_innermost_context() -> None:
    z0, z1, first, second = (rows(4, 5, seed=seed) for seed in range(4))
    criterion = undimix(NTXentLoss(), NonSemanticNegatives())

    def loss(further: Tensor, z1: Tensor = z1) -> Tensor:
        with non_semantic_columns(further):
            value: Tensor = criterion(z0, z1)
        return value

    with non_semantic_columns(first):
        before = criterion(z0, z1)
        assert loss(second) != before == loss(first) == criterion(z0, z1)
        with pytest.raises(ValueError, match=r"^out1: expected 4 rows"):
            loss(second, z1[:3])
        assert criterion(z0, z1) == before
    with pytest.raises(ValueError, match=r"^non_semantic_columns: expected the loss to be called inside of it"):
        criterion(z0, z1)


def test_refuses() -> None:
    z0, z1 = rows(6, 5, seed=0), rows(6, 5, seed=1)
    criterion = undimix(NTXentLoss(), NonSemanticNegatives())
    for further, message in [
        (rows(5, 5), r"^non_semantic_columns: .*\[samples, 5\].*has 12 anchors, one or two for each, got \[5, 5\]"),
        (rows(3, 5), r"^non_semantic_columns: .*\[samples, 5\].*has 12 anchors, one or two for each, got \[3, 5\]"),
        (rows(6, 4), r"^non_semantic_columns: .*\[samples, 5\].*got \[6, 4\]"),
    ]:
        with non_semantic_columns(further), pytest.raises(ValueError, match=message):
            criterion(z0, z1)
    for embeddings, message in [
        ((), r"^embeddings: expected at least one batch, got none"),
        ((z0, z1[:3]), r"^embeddings\[1\]: expected 6 rows, as embeddings\[0\] has, got 3"),
        ((z0[0],), r"^embeddings\[0\]: expected a tensor of shape \[rows, width\], got shape \[5\]"),
    ]:
        with pytest.raises(ValueError, match=message), non_semantic_columns(*embeddings):
            pass
    for alpha in (0.0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match=r"^alpha: expected a finite number .*above 0"):
            NonSemanticNegatives(alpha=alpha)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^alpha: expected at most 1e\+30, got 1e\+39"):
        NonSemanticNegatives(alpha=1e39)


def test_a_checkpoints_hyperparameters_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"weighting": NonSemanticNegatives(alpha=2.0)}, path)
    assert torch.load(path, weights_only=True)["weighting"] == NonSemanticNegatives(alpha=2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "shuffle"}, r"kind: expected one of 'patch', 'texture', got 'shuffle'"),
        ({"patch_size": (0, 72)}, r"patch_size: .*at least 1, got 0"),
        ({"patch_size": (16.5, 72)}, r"patch_size: expected whole numbers, got 16\.5"),
        ({"patch_size": (72, 16)}, r"patch_size: expected the least side and the largest, up to 224, got \(72, 16\)"),
        ({"patch_size": (16, 300)}, r"patch_size: .*up to 224, got \(16, 300\)"),
    ],
    ids=str,
)
def test_transform_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        NonSemanticTransform(**settings)  # type: ignore[arg-type]


def test_transform_refuses_what_are_no_images() -> None:
    for images, message in [
        (torch.rand(28, 28), r"^images: expected a tensor \[channels, height, width\].*got \[28, 28\]"),
        ("image.png", r"^images: .*got str"),
        (
            torch.rand(0, 3, 28, 28),
            r"^images: expected at least one, of at least 4 .* got \[0, 3, 28, 28\]",
        ),
        (torch.rand(3, 3, 28), r"^images: .*at least 4 pixels a side, got \[3, 3, 28\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            NonSemanticTransform()(images)  # type: ignore[arg-type]
