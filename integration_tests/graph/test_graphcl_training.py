"""GraphCL in a PyG training loop on MUTAG: the loss, plain and weighted, train, save, load, resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch_geometric import seed_everything
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GAT, GCN, GIN

from integration_tests.molecules import mutag
from undimix_plugins import HCL, UnDiMix, Uniform, undimix
from undimix_pyg import GraphCL, GraphCLLoss, evaluate_embedding

ENCODERS = {
    "GIN": lambda: GIN(7, 16, num_layers=2),
    "GCN": lambda: GCN(7, 16, num_layers=2),
    "GAT": lambda: GAT(7, 16, num_layers=2),
}
LOSSES: dict[str, Callable[[], GraphCLLoss]] = {
    "class": GraphCLLoss,
    "verb": lambda: undimix(GraphCLLoss(weighting=Uniform()), hardness=2.0),
    "linear": lambda: GraphCLLoss(weighting=UnDiMix(mixing="linear")),
    "HCL": lambda: undimix(GraphCLLoss(), HCL()),
    "plain": lambda: GraphCLLoss(weighting=Uniform()),
}


def published_objective(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """arXiv 2010.13902, equation 3, a graph at a time: the positive is not in the denominator."""
    losses = []
    for i in range(len(z1)):
        similar = cosine_similarity(z1[i], z2, dim=1) / temperature
        others = torch.cat([similar[:i], similar[i + 1 :]])
        losses.append(others.logsumexp(0) - similar[i])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("graphs", [2, 3, 17, 64])
def test_uniform_is_the_published_objective(graphs: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(graphs)
    views = [torch.randn(graphs, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]
    values = GraphCLLoss(temperature=0.2, weighting=Uniform())(*views), published_objective(*views, 0.2)
    torch.testing.assert_close(*values, rtol=0, atol=tolerance)
    gradients = [torch.autograd.grad(value, views) for value in values]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_one_graph_has_no_negatives() -> None:
    z = torch.randn(1, 8, requires_grad=True)
    loss = GraphCLLoss()(z, torch.randn(1, 8))
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert not z.grad.any()


def test_bad_projections() -> None:
    good = torch.randn(4, 8)
    for z2, message in [
        (torch.randn(4, 9), "z2: expected width 8, as z1 has"),
        (torch.randn(3, 8), "z2: expected 4 rows, as z1 has, got 3"),
        (torch.full((4, 8), torch.nan), "z2: expected finite embeddings, got a non-finite value in row 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            GraphCLLoss()(good, z2)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        GraphCLLoss(temperature=-1)


def test_undimix_takes_the_loss() -> None:
    loss = GraphCLLoss(temperature=0.3)
    assert undimix(loss) is loss
    assert undimix(loss, HCL()).weighting == HCL()
    assert undimix(GraphCLLoss(weighting=Uniform())).weighting == UnDiMix()
    assert copy.deepcopy(loss).temperature == 0.3
    with pytest.raises(TypeError, match=r"supported: undimix_pyg: .*GraphCLLoss"):
        undimix(GraphCL(GIN(7, 8, 1), 8))


def train(model: GraphCL, optimizer: torch.optim.Optimizer, criterion: GraphCLLoss, epochs: range) -> list[float]:
    losses = []
    for epoch in epochs:
        seed_everything(epoch)
        for batch in DataLoader(mutag(), batch_size=63, shuffle=True):  # the last batch has 62
            optimizer.zero_grad()
            loss = criterion(*model.train()(batch))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def make(encoder: str) -> tuple[GraphCL, torch.optim.Optimizer]:
    seed_everything(0)
    model = GraphCL(ENCODERS[encoder](), 16)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_train_save_load_resume(encoder: str, loss: str, tmp_path: Path) -> None:
    model, optimizer = make(encoder)
    criterion = LOSSES[loss]()
    first = train(model, optimizer, criterion, range(2))
    assert torch.tensor(first).isfinite().all()
    untrained, _ = make(encoder)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), untrained.parameters(), strict=True)]
    assert all(changed)
    torch.save([model.state_dict(), optimizer.state_dict(), criterion.state_dict()], tmp_path / "checkpoint.pt")
    rest = train(model, optimizer, criterion, range(2, 3))

    resumed, its_optimizer = make(encoder)
    again = LOSSES[loss]()
    for part, state in zip((resumed, its_optimizer, again), torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    torch.testing.assert_close(torch.tensor(train(resumed, its_optimizer, again, range(2, 3))), torch.tensor(rest))


def test_evaluation_of_a_trained_model() -> None:
    model, optimizer = make("GIN")
    train(model, optimizer, GraphCLLoss(), range(2))
    with torch.no_grad():
        batch = next(iter(DataLoader(mutag(), batch_size=188)))
        accuracy, _ = evaluate_embedding(model.eval().embed(batch), batch.y)
    assert accuracy > 0.75  # 0.665 are mutagenic
