from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from slimkit import prune
from slimkit.errors import PlanError
from slimkit.graph import capture, check_equivalence, track


def randomised(model: nn.Module) -> nn.Module:
    """An untrained network whose norms and scales are not trivial."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "layer_scale" in name:
            parameter.data.uniform_(-0.5, 1.5)
    return model.eval()


# The nine networks of the benchmark are in tests/prune; these have other operators.
NETWORKS = ["resnext50_32x4d", "squeezenet1_1", "mobilenet_v3_small", "swin_t"]


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_networks_equal_the_masked_original(name: str) -> None:
    with torch.device("cpu" if name == "swin_t" else "meta"):  # fast: weights are drawn once
        model = get_model(name, num_classes=5)
    model = initialised(model)
    x = torch.randn(1, 3, 40, 40)
    assert track(capture(model, x), model).failed == []
    plan = prune.plan(model, x, ratio=0.3, criterion="random", round_to=1)
    assert plan.after.params < 0.85 * plan.before.params
    proof = check_equivalence(model, plan, x)
    assert proof.equal, str(proof)
    assert proof.max_abs_output > 1e-3


def initialised(model: nn.Module) -> nn.Module:
    """Weights of a network made on the meta device: fast, and of a scale that keeps signals."""
    model = model.to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
        elif not tensor.is_floating_point():
            tensor.zero_()
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.2)
        else:
            tensor.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def small() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )
    return randomised(model), torch.randn(2, 3, 8, 8)


def test_the_norms_that_see_fewer_channels_are_named(small) -> None:
    model, x = small
    plan = prune.plan(model, x, ratio=0.5, round_to=1)
    proof = check_equivalence(model, plan, x)
    assert proof.equal
    assert proof.masked_norms == ("1",)
    assert "equal" in str(proof)


def test_a_wrong_plan_is_caught(small) -> None:
    model, x = small
    plan = prune.plan(model, x, ratio=0.5, round_to=1)

    def with_keep(tensor: str, dim: int, keep: tuple[int, ...]) -> prune.PrunePlan:
        edits = [
            replace(e, keep=keep) if (e.tensor, e.dim) == (tensor, dim) else e for e in plan.edits
        ]
        return replace(plan, edits=tuple(edits))

    kept = next(e.keep for e in plan.edits if (e.tensor, e.dim) == ("3.weight", 1))
    other = tuple(sorted(set(range(8)) - set(kept)))
    with pytest.raises(PlanError, match="leaves channels in dimension"):
        check_equivalence(model, with_keep("3.weight", 1, other), x)
    torch.nn.init.normal_(model[5].weight)
    broken = replace(plan, edits=plan.edits[:-1])
    with pytest.raises(PlanError):
        check_equivalence(model, broken, x)


def test_a_pruned_network_that_computes_something_else_is_different(small) -> None:
    model, x = small
    plan = prune.plan(model, x, ratio=0.5, round_to=1)

    class Wrong:
        edits = plan.edits

        @staticmethod
        def apply_to(model: nn.Module) -> nn.Module:
            pruned = plan.apply_to(model)
            pruned[3].weight.data = pruned[3].weight.data.flip(1)  # inputs in the wrong order
            return pruned

    proof = check_equivalence(model, Wrong(), x)
    assert not proof.equal
    assert "DIFFERENT" in str(proof)


def test_single_precision_is_enough_with_a_wider_tolerance(small, device) -> None:
    model, x = small
    model, x = model.to(device), x.to(device)
    plan = prune.plan(model, x, ratio=0.25, round_to=1)
    assert check_equivalence(model, plan, x, double=False, tolerance=1e-4).equal


def test_a_grid_that_only_the_first_forward_makes() -> None:
    class Grids(dict[torch.dtype, Tensor]):
        """Beside the module, so that nobody restores it after the capture."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)
            self.grids = Grids()

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype not in self.grids:
                grid = torch.eye(x.shape[-1], dtype=x.dtype)
                self.grids[x.dtype] = grid / grid.mean(1, keepdim=True)  # mean#0, once
            x = (self.a(x) @ self.grids[x.dtype]).relu()
            return self.out(x - x.mean(1, keepdim=True))

    model, x = Head().eval(), torch.randn(2, 3, 4, 4)
    plan = prune.plan(model, x, ratio=0.5)
    found = check_equivalence(model, plan, x)
    assert found.equal, found
    assert found.masked_norms == ("",)  # the mean over channels, not the grid's
