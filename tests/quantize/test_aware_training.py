from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from slimkit.errors import InputError
from slimkit.quantize import QuantizedModel, qat

Images = Callable[..., Tensor]


def train(q: nn.Module, images: Images, steps: int) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(q.parameters(), lr=0.05, momentum=0.9)
    x, y = images(32), torch.arange(32) % 10
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(q(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_learns_with_the_rounding_in_place(small: nn.Module, images: Images) -> None:
    q = qat(small, images(1), calibration=[images(16)])
    assert q.training
    losses = train(q, images, 12)
    assert losses[-1] < losses[0] - 0.05
    missing = [name for name, p in q.named_parameters() if p.grad is None]
    assert missing == []


def test_calibrated_ranges_are_frozen(small: nn.Module, images: Images) -> None:
    q = qat(small, images(1), calibration=[images(16)])
    before = q.quantizers["relu_relu"].scale.clone()
    train(q, images, 3)
    assert torch.equal(q.quantizers["relu_relu"].scale, before)


def test_without_calibration_the_first_steps_find_the_ranges(
    small: nn.Module, images: Images
) -> None:
    q = qat(small, images(1), observe_steps=3)
    quantizer = q.quantizers["relu_relu"]
    assert not quantizer.ready
    q.eval()(images(4))
    assert not quantizer.ready  # evaluation does not observe
    train(q.train(), images, 3)
    after_three = quantizer.scale.clone()
    assert quantizer.observed.item() == 3
    train(q, images, 2)
    assert torch.equal(quantizer.scale, after_three)
    assert quantizer.observed.item() == 3


def test_observers_can_be_frozen_early(small: nn.Module, images: Images) -> None:
    q = qat(small, images(1), observe_steps=100)
    train(q, images, 2)
    q.freeze_observers()
    before = q.quantizers["relu_relu"].scale.clone()
    train(q, images, 2)
    assert torch.equal(q.quantizers["relu_relu"].scale, before)


@pytest.mark.parametrize("scales", ["observed", "lsq"])
def test_a_resumed_training_equals_an_uninterrupted_one(
    small: nn.Module, images: Images, scales: str
) -> None:
    q = qat(small, images(1), observe_steps=4, scales=scales)
    q.model.get_submodule("dropout").p = 0.0
    fresh = copy.deepcopy(q)
    train(q, images, 2)
    fresh.load_state_dict(q.state_dict())
    train(q, images, 4)
    train(fresh, images, 4)
    for (name, ours), theirs in zip(
        q.state_dict().items(), fresh.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_zeros_of_a_pruned_weight_stay_zero(small: nn.Module, images: Images) -> None:
    with torch.no_grad():
        small.get_parameter("branch.weight")[::2] = 0.0
    q = qat(small, images(1), calibration=[images(16)])
    weight = q.model.get_parameter("branch.weight")
    rounded = q.quantizers["branch_weight"](weight)
    assert torch.equal(rounded == 0, (weight == 0) | (rounded == 0))
    assert rounded[::2].count_nonzero() == 0


def test_the_weight_scale_follows_the_weight(small: nn.Module, images: Images) -> None:
    q = qat(small, images(1), calibration=[images(16)]).eval()
    with torch.no_grad():
        q.model.get_parameter("branch.weight").mul_(2)
        before = q.quantizers["branch_weight"].scale.clone()
        q(images(1))
    assert torch.equal(q.quantizers["branch_weight"].scale, 2 * before)


def test_training_calls_meet_the_plan_of_evaluation(small: nn.Module, images: Images) -> None:
    """Dropout runs in training only; the calls behind it keep their addresses."""
    q = qat(small, images(1), calibration=[images(16)])
    seen: set[str] = set()
    with q.recording_calls(seen):
        q(images(2))
    assert set(q.plan.calls) <= seen


def test_two_forwards_may_share_a_backward(small: nn.Module, images: Images) -> None:
    q = qat(small, images(1), observe_steps=10)
    (q(images(4)).sum() + q(images(4, 1)).sum()).backward()
    assert q.model.get_parameter("conv1.weight").grad is not None


def test_bf16_autocast_trains(small: nn.Module, images: Images) -> None:
    q = qat(small, images(1), calibration=[images(16)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = q(images(4).to(memory_format=torch.channels_last))
    y.float().sum().backward()
    assert torch.isfinite(q.model.get_parameter("conv1.weight").grad).all()  # type: ignore[arg-type]


def test_no_ranges_at_all_is_refused(small: nn.Module, images: Images) -> None:
    with pytest.raises(InputError, match="observe_steps"):
        qat(small, images(1), observe_steps=0)


def test_the_deep_copy_of_a_training_model_is_its_own(small: nn.Module, images: Images) -> None:
    q = qat(small, images(1), calibration=[images(16)])
    twin = copy.deepcopy(q)
    assert isinstance(twin, QuantizedModel)
    train(twin, images, 2)
    assert not torch.equal(
        twin.model.get_parameter("fc.weight"), q.model.get_parameter("fc.weight")
    )
