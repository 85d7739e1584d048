"""The verb: what it refuses, and that a package which the core does not know can add a toolkit."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from tests import unknown_toolkit
from tests.contrasts import random_rows
from undimix_plugins import HCL, Debiased, UnDiMix, Uniform, compose, info_nce, two_views, undimix
from undimix_plugins.monitoring.warmup import set_hardness
from undimix_plugins.toolkit import WeightedLoss, reweight

GROUP = "undimix_plugins.adapters"


@pytest.fixture
def toolkit(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The unknown toolkit, installed for one test."""
    folder = tmp_path_factory.mktemp("site-packages")
    unknown_toolkit.install(folder)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("strange_toolkit")
    for name in unknown_toolkit.MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def users_code(toolkit: ModuleType) -> ModuleType:
    return importlib.import_module("users_code")


def batch() -> tuple[Tensor, Tensor]:
    return random_rows(5, 4, 0, dtype=torch.float32), random_rows(5, 4, 1, dtype=torch.float32)


def state(loss: nn.Module) -> tuple[object, ...]:
    """Everything that could tell that a loss was touched: its attributes by identity, and its tables' entries."""
    attributes = {name: id(value) for name, value in vars(loss).items()}
    tables = {name: dict(value) for name, value in vars(loss).items() if isinstance(value, dict)}
    return type(loss), attributes, {name: {k: id(v) for k, v in table.items()} for name, table in tables.items()}


def test_refuses_what_is_no_loss_object() -> None:
    with pytest.raises(TypeError, match=r"^loss: expected a loss object such as NTXentLoss\(\), got None$"):
        undimix(None)
    with pytest.raises(TypeError, match=r"^loss: expected a loss object such as ReLU\(\.\.\.\), got the class ReLU$"):
        undimix(nn.ReLU)


class InfoNCE(nn.Module):
    """A user's own, of no toolkit, with a temperature that it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize(
    ("loss", "came"),
    [
        (nn.CrossEntropyLoss(), "CrossEntropyLoss, which compares no anchor with negatives"),
        (nn.Sequential(nn.Linear(2, 2)), "Sequential, which looks like a model: weight the loss that trains it"),
        (InfoNCE(), f"InfoNCE of {InfoNCE.__module__.partition('.')[0]!r}"),
        (len, "builtin_function_or_method of 'builtins'"),
    ],
    ids=["torch's", "model", "own", "function"],
)
def test_refuses_what_no_adapter_knows(loss: object, came: str) -> None:
    with pytest.raises(TypeError) as raised:
        undimix(loss)
    message = str(raised.value)
    assert message.startswith("loss: expected a contrastive loss that an adapter knows, of ")
    assert f", got {came}. To weight a loss of your own, call info_nce(two_views(*unit_rows(" in message
    assert "weighted(loss, weighting)" in message
    assert repr(GROUP) in message
    for toolkit in ("lightly", "sentence_transformers", "undimix_pyg", "undimix_transformers"):
        assert toolkit in message


@pytest.mark.parametrize(
    ("option", "to_do"),
    [
        ({"temperature": 0.1}, r"NTXentLoss\(temperature=0\.2\); a ranking loss has scale=5 for that$"),
        ({"scale": 5}, r"MultipleNegativesRankingLoss\(model, scale=5\)$"),
        ({"beta": 0.5}, r"undimix\(loss, HCL\(beta=0\.5, tau_plus=0\)\)$"),
        ({"tau_plus": 0.1}, r"HCL or Debiased"),
        ({"alpha": 9}, r"SimilarityPenalty"),
        ({"labels": [0, 1]}, r"criterion\(z0, z1, labels\)"),
    ],
    ids=str,
)
def test_says_where_an_option_belongs(option: dict[str, object], to_do: str, toolkit: ModuleType) -> None:
    ((name, value),) = option.items()
    came = re.escape(f"options: {name} is no option of undimix(), got {name}={value!r}: ")
    with pytest.raises(TypeError, match=rf"^{came}.*{to_do}"):
        undimix(toolkit.PairLoss(), **option)


def test_refuses_what_is_no_weighting(toolkit: ModuleType) -> None:
    loss = toolkit.PairLoss()
    with pytest.raises(TypeError, match=r"^weighting: expected an instance of Weighting .*, got the class HCL$"):
        undimix(loss, HCL)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^weighting: expected an instance of Weighting .*, got 'hcl'$"):
        undimix(loss, "hcl")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"^options: expected none of UnDiMix beside a weighting, got hardness beside HCL"
    ):
        undimix(loss, HCL(), hardness=2.0)
    with pytest.raises(TypeError, match=r"^weighting: expected an instance .*; several become one by compose\("):
        undimix(loss, [UnDiMix(), HCL()])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="hardnes"):
        undimix(loss, hardnes=2.0)
    with pytest.raises(ValueError, match=r"^hardness: .*got -1"):
        undimix(loss, hardness=-1)


def test_an_unknown_toolkit_joins_in(toolkit: ModuleType) -> None:
    host = toolkit.PairLoss()
    with pytest.raises(TypeError, match=r"an adapter knows, of .*strange_toolkit.*, got ReLU"):
        undimix(nn.ReLU())
    plain = undimix(host, Uniform())
    torch.testing.assert_close(plain(*batch()), host(*batch()))
    weighted = undimix(host)
    expected = info_nce(two_views(*host.views(*batch()), host.temperature), UnDiMix())
    assert torch.equal(weighted(*batch()), expected)
    assert (expected - host(*batch())).abs() > 1e-3
    assert undimix(host, hardness=2.0, mixing="linear").weighting == UnDiMix(hardness=2.0, mixing="linear")
    assert undimix(host, HCL(0.5)).weighting == HCL(0.5)


@pytest.mark.parametrize("own", [False, True], ids=["toolkit's", "user's"])
class TestDropIn:
    @pytest.fixture
    def host(self, own: bool, toolkit: ModuleType, users_code: ModuleType) -> nn.Module:
        loss: nn.Module = users_code.LoudLoss() if own else toolkit.PairLoss(temperature=0.25)
        return loss

    def test_same_class_and_settings(self, host: nn.Module, own: bool, toolkit: ModuleType) -> None:
        weighted = undimix(host)
        assert isinstance(weighted, type(host))
        assert isinstance(weighted, toolkit.PairLoss)
        assert isinstance(weighted, WeightedLoss)
        assert weighted.temperature == 0.25
        assert weighted.training
        assert re.search(r"weighting=UnDiMix\(", repr(weighted))
        if own:
            assert type(weighted).__name__ == "LoudLoss"
            assert weighted.shout() == "loud"
            assert weighted.heard is host.heard
            assert type(undimix(host)) is type(weighted)

    def test_host_is_left_alone(self, host: nn.Module) -> None:
        before = state(host)
        weighted = undimix(host)
        weighted(*batch())
        weighted.later = nn.Linear(2, 2)
        weighted.register_buffer("more", torch.zeros(1), persistent=False)
        weighted.register_forward_hook(lambda module, inputs, output: output * 0)
        weighted.eval()
        weighted.temperature = 9.0
        # Modules are shared, and so is the projector's mode: that is the host's own eval() as well.
        host.projector.train()
        assert state(host) == before
        assert host(*batch()) != 0

    def test_tensors_are_shared(self, host: nn.Module) -> None:
        weighted = undimix(host)
        assert weighted.projector is host.projector
        assert weighted.scale is host.scale
        assert weighted.seen is host.seen
        weighted(*batch())
        assert host.seen == 5
        optimiser = torch.optim.SGD(host.parameters(), lr=0.1)
        weighted(*batch()).backward()
        optimiser.step()
        assert (host.scale != 1).item()
        assert [id(p) for p in weighted.parameters()] == [id(p) for p in host.parameters()]
        assert weighted.state_dict().keys() == host.state_dict().keys()

    def test_hooks_of_the_host_still_run(self, host: nn.Module) -> None:
        host.register_forward_hook(lambda module, inputs, output: output + 100)
        assert undimix(host)(*batch()) > 99

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
    def test_copies(self, host: nn.Module, duplicate: object) -> None:
        weighted = undimix(host, HCL(0.5))
        again = duplicate(weighted)  # type: ignore[operator]
        assert type(again) is type(weighted)
        assert again.weighting == HCL(0.5)
        assert again.scale is not weighted.scale
        assert torch.equal(again(*batch()), weighted(*batch()))
        assert undimix(again) is again

    def test_weighted_already(self, host: nn.Module) -> None:
        weighted = undimix(host)
        assert undimix(weighted) is weighted
        other = undimix(weighted, HCL())
        assert other is not weighted
        assert type(other) is type(weighted)
        assert (weighted.weighting, other.weighting) == (UnDiMix(), HCL())
        assert other.seen is host.seen
        assert undimix(weighted, hardness=3.0).weighting == UnDiMix(hardness=3.0)

    def test_options_change_what_they_name(self, host: nn.Module) -> None:
        harder = undimix(host, hardness=2.0, influence=0.0)
        assert undimix(harder, similarity=1.0).weighting == UnDiMix(similarity=1.0, influence=0.0, hardness=2.0)
        set_hardness(harder, 0.25)  # in the middle of a warm-up
        assert undimix(harder, similarity=1.0).weighting == UnDiMix(similarity=1.0, influence=0.0, hardness=2.0)
        composed = undimix(host, compose(UnDiMix(hardness=2.0), Debiased()))
        assert undimix(composed, diversity=0.0).weighting == compose(UnDiMix(diversity=0.0, hardness=2.0), Debiased())
        assert undimix(undimix(host, Uniform()), diversity=0.0).weighting == UnDiMix(diversity=0.0)
        with pytest.raises(TypeError, match=r"^options: .* a loss that is weighted by HCL\(.*\), got diversity; for"):
            undimix(undimix(host, HCL()), diversity=0.0)

    def test_plain_is_not_weighted_already(self, host: nn.Module) -> None:
        plain = undimix(host, Uniform())
        assert undimix(plain).weighting == UnDiMix()
        assert plain.weighting == Uniform()


def test_refuses_a_loss_that_is_not_supported(toolkit: ModuleType) -> None:
    message = r"^loss: OtherLoss has no negatives to weight or is not supported; supported: strange_toolkit: PairLoss$"
    with pytest.raises(TypeError, match=message):
        undimix(toolkit.OtherLoss())


def test_supported_losses_are_listed_by_toolkit() -> None:
    """And a model is told from a loss."""

    def host(toolkit: str, name: str) -> type[nn.Module]:
        return type(name, (nn.Module,), {"__module__": f"{toolkit}.losses"})

    hosts = [host("one", "BLoss"), host("other", "CLoss"), host("one", "ALoss"), host("one", "BLoss")]
    supported = "supported: one: ALoss, BLoss; other: CLoss"
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError) as raised:
        reweight(model, None, dict.fromkeys(hosts, WeightedLoss))
    assert str(raised.value) == (
        f"loss: Sequential looks like a model, not a loss: weight the loss that trains it; {supported}"
    )
    with pytest.raises(TypeError) as raised:
        reweight(nn.CrossEntropyLoss(), None, dict.fromkeys(hosts, WeightedLoss))
    assert str(raised.value) == (
        "loss: CrossEntropyLoss has no negatives to weight or is not supported, which compares no anchor with "
        f"negatives; {supported}"
    )


def test_refuses_code_that_would_be_lost(toolkit: ModuleType, users_code: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"^loss: RewrittenLoss replaces PairLoss\.forward by its own"):
        undimix(users_code.RewrittenLoss())
    patched = toolkit.PairLoss()
    patched.forward = lambda first, second: first.sum()
    with pytest.raises(TypeError, match=r"^loss: PairLoss replaces PairLoss\.forward by its own"):
        undimix(patched)


def test_a_temperature_that_makes_all_negatives_alike_is_told(toolkit: ModuleType) -> None:
    told = r"^temperature=20\.0: at such a temperature all candidates count nearly the same\. Usual: 0\.05 to 0\.5 .*"
    with pytest.warns(UserWarning, match=told):
        undimix(toolkit.PairLoss(temperature=20.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undimix(toolkit.PairLoss(temperature=2.0))
    with pytest.raises(ValueError, match=r"^temperature: expected at least 1e-10, got 5e-324$"):
        undimix(toolkit.PairLoss(temperature=5e-324))
