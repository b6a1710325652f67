from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import UnknownNameError
from slimkit.quantize import NumberFormat, QuantizedModel, Target, qat
from slimkit.quantize.quantizers.learned import (
    LsqActivation,
    LsqWeight,
    PactActivation,
)
from slimkit.quantize.scales import mse_weight_grid, pair_sums, weight_grid
from slimkit.quantize.specs import QuantizerSpec
from slimkit.runtime import export
from slimkit.runtime.fake_quantize import quantized_integers
from slimkit.runtime.fusion import fusion_report
from slimkit.runtime.output_parity import parity
from slimkit.train import TrainSettings
from slimkit.train.optimisation import build_optimizer

Images = Callable[..., Tensor]
INT8 = NumberFormat(8, signed=True, symmetric=True)


def train(q: QuantizedModel, images: Images, steps: int, lr: float = 0.02) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(q.parameters(), lr=lr, momentum=0.9)
    x, y = images(32), torch.arange(32) % 10
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(q(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def low_bit(bits: int) -> Target:
    return Target("few", activation=NumberFormat(bits), sums="int32")


def test_every_scale_is_a_parameter_that_the_loss_moves(small: nn.Module, images: Images) -> None:
    q = qat(small, images(1), calibration=[images(16)], scales="lsq")
    before = {name: p.detach().clone() for name, p in q.quantizers.named_parameters()}
    train(q, images, 3)
    still = {n for n, p in q.quantizers.named_parameters() if torch.equal(p, before[n])}
    fixed = {n for n, p in q.quantizers.named_parameters() if not p.requires_grad}
    assert len(before) > 15
    assert all(n.endswith(".offset") for n in (*still, *fixed))  # as nothing was clipped
    assert all(p.grad is not None for p in q.parameters() if p.requires_grad)
    assert "relu_relu.offset" in fixed  # never negative: the zero point stays 0
    assert "input.offset" not in fixed


def test_it_starts_from_the_observed_ranges(small: nn.Module, images: Images) -> None:
    data = [images(16)]
    observed = qat(small, images(1), calibration=data, observer="mse")
    for scales in ("lsq", "pact"):
        q = qat(small, images(1), calibration=data, scales=scales)
        for name, quantizer in q.activation_quantizers().items():
            assert torch.equal(quantizer.scale, observed.quantizers[name].scale)
            quantizer.refresh()
            torch.testing.assert_close(quantizer.scale, observed.quantizers[name].scale)
            assert torch.equal(quantizer.zero_point, observed.quantizers[name].zero_point)


def test_pact_trains_the_clips_behind_relus_only(small: nn.Module, images: Images) -> None:
    q = qat(small, images(1), calibration=[images(16)], scales="pact")
    clips = {n for n, m in q.quantizers.items() if isinstance(m, PactActivation)}
    assert clips == {"relu_relu", "relu6_hardtanh", "relu_relu1", "relu"}
    before = q.quantizers["relu6_hardtanh"].clip.detach().clone()
    train(q, images, 3)
    assert not torch.equal(q.quantizers["relu6_hardtanh"].clip, before)
    q.eval()
    with torch.no_grad():
        q(images(1))
    assert torch.allclose(
        q.quantizers["relu6_hardtanh"].scale, q.quantizers["relu6_hardtanh"].clip.detach() / 255
    )


def fit(model: nn.Module, images: Images, steps: int, lr: float) -> float:
    """Mean loss of the last steps, with a learning rate that falls to 0."""
    x, y = images(32), torch.arange(32) % 10
    optimizer = torch.optim.SGD(model.train().parameters(), lr=lr, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.parametrize(
    ("bits", "steps", "observer"),
    [(2, 80, "mse"), (3, 10, None)],
    ids=["2 bits, from the same ranges", "3 bits, by default"],
)
def test_learned_scales_beat_observed_ones_at_few_bits(
    bits: int, steps: int, observer: str | None, images: Images
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    assert fit(model, images, 150, lr=0.1) < 0.01
    model.eval()
    last = {}
    for scales in ("observed", "lsq"):
        q = qat(
            model, images(1), calibration=[images(32)], target=low_bit(bits),
            weight_bits=bits, scales=scales, observer=observer,
        )  # fmt: skip
        last[scales] = fit(q, images, steps, lr=0.05)
    assert last["lsq"] < 0.5 * last["observed"], last


def test_the_trained_network_runs_alike_in_onnx_runtime(
    small: nn.Module, images: Images, tmp_path: Path
) -> None:
    q = qat(small, images(1), calibration=[images(16)], scales="lsq")
    train(q, images, 5)
    path = tmp_path / "int8.onnx"
    export(q.eval(), path, images(1))  # no forward since the last step of the optimizer
    assert fusion_report(path).float_nodes == ()
    result = parity(q, path, [images(32, 5)])
    assert result.sqnr_db >= 30
    assert result.top1_agreement >= 0.95


def test_saving_loading_and_a_state_dict_keep_the_scales(
    small: nn.Module, images: Images, tmp_path: Path
) -> None:
    fresh = copy.deepcopy(small)
    q = qat(small, images(1), calibration=[images(16)], scales="lsq")
    train(q, images, 3)
    q.eval()
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=fresh).eval()
    assert isinstance(again, QuantizedModel)
    assert isinstance(again.quantizers["conv1_weight"], LsqWeight)
    assert again.plan.to_json() == q.plan.to_json()
    with torch.no_grad():
        assert torch.equal(again(images(4)), q(images(4)))
    offsets = [m.offset for m in again.quantizers.values() if isinstance(m, LsqActivation)]
    assert {p.requires_grad for p in offsets if p is not None} == {True, False}


def test_zeros_stay_zero_and_zero_points_whole(small: nn.Module, images: Images) -> None:
    with torch.no_grad():
        small.get_parameter("branch.weight")[::2] = 0.0
    q = qat(small, images(1), calibration=[images(16)], scales="lsq")
    mask = q.model.get_parameter("branch.weight") != 0
    for _ in range(3):
        train(q, images, 1)
        with torch.no_grad():
            q.model.get_parameter("branch.weight").mul_(mask)
    rounded = q.quantizers["branch_weight"](q.model.get_parameter("branch.weight"))
    assert rounded[::2].count_nonzero() == 0
    for quantizer in q.activation_quantizers().values():
        assert quantizer(torch.zeros(3, 2)).count_nonzero() == 0
        assert quantizer.zero_point.dtype == torch.int32


def test_a_lost_step_size_comes_back_positive() -> None:
    quantizer = LsqWeight(QuantizerSpec("w", INT8, "w", channels=2, scale="learned"))
    weight = torch.randn(2, 8)
    quantizer(weight)
    with torch.no_grad():
        quantizer.step_size.fill_(-1.0)
    assert torch.isfinite(quantizer(weight)).all()
    assert (quantizer.step_size > 0).all()
    assert torch.equal(quantizer.scale, quantizer.step_size)


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), shrink=st.floats(0.01, 2.0), per_channel=st.booleans())
def test_no_pair_exceeds_sixteen_bits_wherever_the_step_size_goes(
    seed: int, shrink: float, per_channel: bool
) -> None:
    weight = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(seed))
    channels = 3 if per_channel else None
    spec = QuantizerSpec("w", INT8, "w", channels=channels, pairs=True, scale="learned")
    quantizer = LsqWeight(spec)
    quantizer(weight)
    with torch.no_grad():
        quantizer.step_size.mul_(shrink)
    scale = quantizer.refresh(weight)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    levels = quantized_integers(weight, scale, zero, qmin=-127, qmax=127, axis=quantizer.axis)
    assert 255 * int(pair_sums(levels).abs().max()) < 2**15


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_first_weight_scale_has_a_smaller_error_than_the_largest_one(bits: int) -> None:
    form = NumberFormat(bits, signed=True, symmetric=True)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))

    def error(scale: Tensor) -> Tensor:
        s = scale[:, None]
        return ((weight / s).round().clamp(form.qmin, form.qmax) * s - weight).square().sum(1)

    best, largest = mse_weight_grid(weight, form, 0)[0], weight_grid(weight, form, 0)[0]
    assert (error(best) <= error(largest) * 1.0001).all()
    if bits == 2:
        assert (error(best) < 0.7 * error(largest)).all()


def test_weight_decay_leaves_step_sizes_alone_but_not_clips(
    small: nn.Module, images: Images
) -> None:
    for scales, decayed in (("lsq", False), ("pact", True)):
        q = qat(small, images(1), calibration=[images(16)], scales=scales)
        optimizer = build_optimizer(q, TrainSettings(weight_decay=0.1))
        group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        ours = [group[id(p)] for p in q.quantizers.parameters() if p.requires_grad]
        assert ours
        assert {g["weight_decay"] > 0 for g in ours} == {decayed}
        assert group[id(q.model.get_parameter("conv1.weight"))]["weight_decay"] == 0.1


def test_bf16_autocast_trains(small: nn.Module, images: Images) -> None:
    q = qat(small, images(1), calibration=[images(16)], scales="lsq")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = q(images(4).to(memory_format=torch.channels_last))
    y.float().sum().backward()
    grads = [p.grad for p in q.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


def test_an_unknown_name_gets_the_nearest(small: nn.Module, images: Images) -> None:
    with pytest.raises(UnknownNameError, match="'lsq'"):
        qat(small, images(1), calibration=[images(4)], scales="lsqq")
