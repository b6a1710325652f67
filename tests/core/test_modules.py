from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

import slimkit as sk
from slimkit.errors import ModelError
from slimkit.graph import check_equivalence
from slimkit.modules import copy_module, evaluation, restored_flags, set_evaluation


class KeepsActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.seen: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen = {"features": [self.first(x).relu()]}
        return self.last(self.seen["features"][0])


class HoldsLock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.guard = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        head = weight_norm(nn.Linear(16, 4, bias=False))
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), head).eval()


def kept() -> KeepsActivation:
    torch.manual_seed(0)
    net = KeepsActivation()
    net(torch.randn(2, 3, 8, 8)).mean().backward()
    return net.eval()


@pytest.mark.parametrize(
    ("make", "x"), [(normed, torch.randn(4, 8)), (kept, torch.randn(2, 3, 8, 8))]
)
def test_tensors_with_a_history_do_not_stop_a_copy(make: object, x: Tensor) -> None:
    net = make()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    twin = copy_module(net)
    assert torch.equal(twin(x), net(x))
    before = net(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(net(x), before)
    twin(x).sum().backward()  # the copy computes from its own parameters, with gradients
    assert all(parameter.grad is not None for parameter in twin.parameters())


@pytest.mark.parametrize(
    ("make", "x"), [(normed, torch.randn(4, 8)), (kept, torch.randn(2, 3, 8, 8))]
)
def test_every_verb_copies_them(make: object, x: Tensor) -> None:
    net = make()  # type: ignore[operator]
    expected = net(x).detach()
    plan = sk.prune.plan(net, x, ratio=0.5)
    assert check_equivalence(net, plan, x).equal
    assert sk.quantize.ptq(net, x, calibration=[x]).plan.quantizers
    assert sk.quantize.qat(net, x, calibration=[x]).plan.quantizers
    assert torch.allclose(sk.reparam.fuse(net, x)(x), expected, atol=1e-6)
    sk.distill.Distiller(copy_module(net), net, losses=[{"type": "kd"}], example_inputs=x)
    assert torch.equal(net(x), expected)


def test_what_cannot_be_copied_is_named_with_a_remedy() -> None:
    with pytest.raises(ModelError, match=r"model\.inner\.guard: it cannot be copied.*set it"):
        copy_module(HoldsLock())
    with pytest.raises(ModelError, match=r"^teacher\.inner\.guard"):
        sk.distill.Distiller(nn.Linear(2, 2), HoldsLock(), losses=[{"type": "kd"}])
    with pytest.raises(ModelError, match=r"^model\.inner\.guard"):
        sk.quantize.ptq(HoldsLock(), torch.randn(1, 2), calibration=[torch.randn(1, 2)])


@pytest.fixture
def mixed() -> nn.Sequential:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    net.train()
    net[1].eval()
    return net


def test_each_modules_own_flag_comes_back(mixed: nn.Sequential) -> None:
    before = [module.training for module in mixed.modules()]
    with evaluation(mixed):
        assert not any(module.training for module in mixed.modules())
    assert [module.training for module in mixed.modules()] == before
    with restored_flags(mixed):
        mixed.train()
    assert [module.training for module in mixed.modules()] == before


def test_an_exported_program_stays_in_its_mode() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout()).eval()
    x = torch.randn(2, 3)
    whole = nn.Sequential(nn.Dropout(), torch.export.export(net, (x,)).module())
    with pytest.raises(NotImplementedError):
        whole.eval()
    whole[0].train()
    with evaluation(whole):
        assert not whole[0].training
        assert torch.equal(whole(x), net(x))
    assert whole[0].training
    assert set_evaluation(whole) is whole


def test_an_exported_program_goes_through_every_verb(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(net, (x,)).module()
    assert sk.profile(program, x).macs == sk.profile(net, x).macs
    plan = sk.prune.plan(program, x, ratio=0.5)
    assert check_equivalence(program, plan, x).equal
    assert sk.apply(program, plan)(x).shape == (2, 8, 4, 4)
    again = torch.export.export(net, (x,)).module()
    sk.export(again, tmp_path / "model.onnx", x, dynamic_batch=False)
    assert sk.quantize.ptq(again, x, calibration=[x]).plan.quantizers
    with pytest.raises(sk.SlimkitError, match="batch"):  # it was traced for two
        sk.export(again, tmp_path / "model.onnx", x)
