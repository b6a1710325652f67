"""What all methods that change the rounding of weights have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import InputError
from slimkit.quantize import Method, PerGroup, QuantizedModel, ptq
from slimkit.quantize.methods.adaround import AdaRound
from slimkit.quantize.methods.bias_correction import BiasCorrection
from slimkit.quantize.methods.bias_tuning import BiasTuning
from slimkit.quantize.methods.gptq import GPTQ
from slimkit.quantize.methods.reconstruction import Reconstruct
from slimkit.quantize.methods.streams import Streams
from slimkit.quantize.quantizers.fixed import WeightQuantizer
from slimkit.quantize.scales import pair_sums
from slimkit.runtime import export
from slimkit.runtime.fake_quantize import on_grid, quantized_integers
from slimkit.runtime.output_parity import parity

Images = Callable[..., Tensor]

ADAROUND = AdaRound(iterations=60, lr=0.1, batch=256, positions=1024)
RECONSTRUCT = Reconstruct(iterations=30, lr=0.1, images=32)
ROUNDING: list[Method] = [ADAROUND, GPTQ(), GPTQ(behind_activation=True), RECONSTRUCT]


def name(method: Any) -> str:
    return type(method).__name__ if not isinstance(method, str) else method


@torch.no_grad()
def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to noise in dB."""
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


def repaired(
    model: nn.Module, images: Images, *methods: Method | str, **options: Any
) -> QuantizedModel:
    options = {"weight_bits": 4, **options}
    batches = [images(16, seed) for seed in range(4)]
    return ptq(model, images(1), calibration=batches, methods=methods, **options)


def levels(q: QuantizedModel) -> dict[str, Tensor]:
    """Integers minus zero points, of weights with a scale per tensor or per channel."""
    found = {}
    for spec in q.plan.quantizers:
        quantizer = q.quantizers[spec.name]
        if isinstance(quantizer, WeightQuantizer) and spec.parameter is not None:
            weight = q.model.get_parameter(spec.parameter)
            scale = quantizer.refresh(weight)
            found[spec.parameter] = quantized_integers(
                weight, scale, torch.zeros_like(scale), qmin=-1000, qmax=1000, axis=quantizer.axis
            )
    return found


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.last = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(F.relu6(self.depthwise(F.relu6(self.first(x))))))


def residual_network() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(Residual(8), Residual(8))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), blocks, *head).eval()


@pytest.mark.parametrize(
    ("method", "gain"), [(BiasCorrection(), 4), (ADAROUND, 8), (GPTQ(), 9)], ids=name
)
def test_outputs_come_nearer_to_the_float_network(
    small: nn.Module, images: Images, method: Method, gain: float
) -> None:
    x = images(64, 99)
    reference = small(x)
    plain = sqnr(reference, repaired(small, images)(x))
    assert sqnr(reference, repaired(small, images, method)(x)) > plain + gain


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_reconstruction_optimises_blocks_and_activation_scales(images: Images, drop: float) -> None:
    model, x = residual_network(), images(64, 99)
    method = Reconstruct(iterations=40, lr=0.1, images=32, drop=drop)
    plain, q = repaired(model, images), repaired(model, images, method)
    reference = model(x)
    assert sqnr(reference, q(x)) > sqnr(reference, plain(x)) + 3
    changed = {
        key
        for key, quantizer in q.activation_quantizers().items()
        if not torch.equal(quantizer.scale, plain.quantizers[key].scale)
    }
    assert {key.split("_")[0] for key in changed} == {"2"}  # inside the two blocks only
    assert "2_0_relu6" in changed


@pytest.mark.parametrize("method", ROUNDING, ids=name)
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_lie_on_the_grid_with_a_fixed_scale(
    small: nn.Module, images: Images, method: Method, bits: int
) -> None:
    q = repaired(small, images, method, weight_bits=bits, granularity="tensor")
    found = levels(q)
    assert len(found) == 5
    for spec in q.plan.quantizers:
        if spec.parameter is not None:
            assert spec.scale == "fixed"
            weight = q.model.get_parameter(spec.parameter)
            quantizer = q.quantizers[spec.name]
            assert torch.equal(found[spec.parameter] * quantizer.scale, weight)
            integers = found[spec.parameter] + quantizer.zero_point
            assert spec.form.qmin <= integers.min() <= integers.max() <= spec.form.qmax


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("method", ROUNDING, ids=name)
def test_pairs_stay_within_16_bits(
    small: nn.Module, images: Images, method: Method, granularity: str
) -> None:
    with torch.no_grad():  # neighbours alike: rounding up wherever it may, pairs would overflow
        for parameter in (small.pointwise.weight, small.fc.weight):
            parameter.copy_(parameter.abs().clamp(min=0.9 * parameter.abs().max()))
    q = repaired(
        small, images, method, weight_bits=8, granularity=granularity, target="onnxruntime-avx2"
    )
    sums = {key: int(pair_sums(value).abs().max()) for key, value in levels(q).items()}
    del sums["depthwise.weight"]
    assert max(sums.values()) <= 128
    assert sums["pointwise.weight"] >= 120


@pytest.mark.parametrize("method", ROUNDING, ids=name)
def test_pruned_weights_stay_zero(small: nn.Module, images: Images, method: Method) -> None:
    with torch.no_grad():
        for module in (small.conv1, small.pointwise, small.depthwise):
            module.weight.mul_(torch.rand_like(module.weight) > 0.5)
    q = repaired(small, images, method)
    for path in ("conv1", "pointwise", "depthwise"):
        zeros = small.get_parameter(f"{path}.weight") == 0
        assert bool((q.model.get_parameter(f"{path}.weight")[zeros] == 0).all())


@pytest.mark.parametrize("methods", [[GPTQ()], ["bias_correction"], [ADAROUND, "bias_correction"]])
def test_saved_and_exported_it_computes_the_same(
    small: nn.Module, images: Images, methods: list[Method | str], tmp_path: Path
) -> None:
    q = repaired(small, images, *methods)
    x = images(32, 7)
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=type(small)()).eval()
    with torch.no_grad():
        assert torch.equal(again(x), q(x))
    export(again, tmp_path / "int8.onnx", images(2))
    result = parity(q, tmp_path / "int8.onnx", [x])
    assert result.sqnr_db >= 30
    assert result.top1_agreement >= 0.99


def test_methods_compose(small: nn.Module, images: Images) -> None:
    x = images(64, 99)
    reference = small(x)
    alone = repaired(small, images, ADAROUND)
    both = repaired(small, images, ADAROUND, "bias_correction")
    assert sqnr(reference, both(x)) > sqnr(reference, alone(x)) - 1
    assert all(torch.equal(value, levels(alone)[key]) for key, value in levels(both).items())
    # A weight that is fixed is not rounded again.
    twice = repaired(small, images, ADAROUND, GPTQ())
    assert all(torch.equal(value, levels(alone)[key]) for key, value in levels(twice).items())


@pytest.mark.parametrize("method", ROUNDING, ids=name)
def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone(
    images: Images, method: Method
) -> None:
    model = residual_network()
    state = torch.get_rng_state()
    first = repaired(model, images, method).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = repaired(model, images, method).state_dict()
    assert all(torch.equal(second[key], value) for key, value in first.items())


def test_samples_know_which_image_they_are_of(small: nn.Module, images: Images) -> None:
    found: list[list[int]] = []

    class Probe:
        when = "after"

        def run(self, work: Any) -> None:
            streams = Streams(work)
            for layer in streams.layers:
                samples = streams.draw(layer, 300, torch.Generator().manual_seed(0))
                assert samples is not None
                assert samples.examples is not None
                assert len(samples.examples) == len(samples.targets)
                found.append(samples.examples.tolist())

    probe: Any = Probe()
    batches = [images(4, seed) for seed in range(3)]
    ptq(small, images(1), calibration=batches, methods=[probe])
    assert len(found) > 1
    for examples in found:
        assert examples == sorted(examples)
        assert set(examples) == set(range(12))


def test_bias_correction_centres_what_images_agree_about(small: nn.Module, images: Images) -> None:
    batches = [images(16, seed) for seed in range(4)]
    settings: dict[str, Any] = {"calibration": batches, "weight_bits": 4}
    plain = ptq(small, images(1), **settings, methods=[])
    q = ptq(small, images(1), **settings, methods=["bias_correction"])
    x = torch.cat(batches)
    with torch.no_grad():
        errors = [quantized(x) - small(x) for quantized in (plain, q)]
    before, after = (float(error.mean(0).square().mean()) for error in errors)
    assert after < 0.01 * before
    chance = errors[1].std(0) / len(x) ** 0.5
    assert bool((errors[1].mean(0).abs() < 2 * chance).all())


@pytest.mark.parametrize("coarse", [{"granularity": "tensor"}, {"weight_bits": {"fc": 4}}])
def test_coarse_weights_are_repaired_by_default(
    poisoned: nn.Module, images: Images, coarse: dict[str, Any]
) -> None:
    batches = [images(16, seed) for seed in range(4)]
    repaired = ptq(poisoned, images(1), calibration=batches, **coarse)
    plain = ptq(poisoned, images(1), calibration=batches, methods=[], **coarse)
    weights = {spec.name: spec for spec in repaired.plan.quantizers if spec.parameter is not None}
    assert {spec.scale for spec in weights.values()} == {"fixed"}
    x = images(16, 99)
    with torch.no_grad():
        assert sqnr(poisoned(x), repaired(x)) > sqnr(poisoned(x), plain(x)) + 3


def test_fine_weights_and_missing_data_leave_nothing_to_repair(
    small: nn.Module, images: Images
) -> None:
    for choices in ({"calibration": [images(4)]}, {"mode": "weights", "weight_bits": 4}):
        q = ptq(small, images(1), **choices)
        assert {spec.scale for spec in q.plan.quantizers if spec.parameter} == {"follows"}


def test_too_wide_layers_are_rounded_to_nearest(small: nn.Module, images: Images) -> None:
    choices: dict[str, Any] = {"calibration": [images(8)], "weight_bits": 4}
    q = ptq(small, images(1), methods=[GPTQ(widest=1)], **choices)
    plain = ptq(small, images(1), methods=[], **choices)
    with torch.no_grad():
        assert torch.equal(q(images(4)), plain(images(4)))


class Twice(nn.Module):
    """One convolution runs twice, one belongs to two modules, one has no bias and no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.repeated = nn.Conv2d(3, 3, 3, padding=1)
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 1, bias=False)
        self.second.weight = self.first.weight
        self.rare = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.repeated(torch.relu(self.repeated(x))))
        y = self.second(torch.relu(self.first(y)))
        return self.rare(y) if x.shape[-1] > 16 else y


@pytest.mark.parametrize("method", [*ROUNDING, BiasCorrection(), BiasTuning()], ids=name)
def test_shared_rare_and_skipped_layers(images: Images, method: Method) -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    batches = [images(16, seed) for seed in range(2)]
    wide = F.interpolate(images(1), size=24)
    with pytest.warns(UserWarning, match="rare:conv2d#0 did not run"):
        q = ptq(model, wide, calibration=batches, weight_bits=4, methods=[method])
    plain = ptq(model, images(1), calibration=batches, weight_bits=4, methods=[])
    x = images(16, 99)
    assert sqnr(model(x), q(x)) > sqnr(model(x), plain(x))
    assert q.model.get_parameter("first.weight") is q.model.get_parameter("second.weight")
    assert torch.equal(q.model.get_parameter("rare.weight"), model.rare.weight)
    skipped = ptq(model, images(1), calibration=batches, skip=["repeated"], methods=[method])
    assert torch.equal(skipped.model.get_parameter("repeated.weight"), model.repeated.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "dynamic"},
        {"mode": "weights"},
        {"mode": "weights", "granularity": PerGroup(16)},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("method", [*ROUNDING, BiasCorrection()], ids=name)
def test_every_mode_of_quantization_gains(
    small: nn.Module, images: Images, method: Method, options: dict[str, Any], tmp_path: Path
) -> None:
    x = images(64, 99)
    q = repaired(small, images, method, **options)
    assert sqnr(small(x), q(x)) > sqnr(small(x), repaired(small, images, **options)(x)) + 3
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=type(small)()).eval()
    assert torch.equal(again(x), q(x))


@pytest.mark.parametrize("method", ROUNDING, ids=name)
def test_scales_stay_in_the_short_list_of_the_target(
    small: nn.Module, images: Images, method: Method
) -> None:
    q = repaired(small, images, method)
    compact = [spec for spec in q.plan.quantizers if spec.parameter is not None and spec.compact]
    assert len(compact) == 5
    for spec in compact:
        scale = q.quantizers[spec.name].scale
        torch.testing.assert_close(on_grid(scale), scale, rtol=0, atol=0)


class FixedFilter(nn.Module):
    """A convolution whose weight is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.register_buffer("filters", torch.randn(4, 6, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(torch.relu(self.conv(x)), self.filters, padding=1)


@pytest.mark.parametrize("method", ROUNDING, ids=name)
def test_weights_that_are_buffers(images: Images, method: Method) -> None:
    torch.manual_seed(0)
    model, x = FixedFilter().eval(), images(64, 99)
    q = repaired(model, images, method)
    assert {spec.scale for spec in q.plan.quantizers if spec.parameter} == {"fixed"}
    assert sqnr(model(x), q(x)) > sqnr(model(x), repaired(model, images)(x)) + 1


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: AdaRound(iterations=0), "iterations"),
        (lambda: AdaRound(scale="median"), "scale"),  # type: ignore[arg-type]
        (lambda: GPTQ(damping=0.0), "damping"),
        (lambda: Reconstruct(drop=1.5), "drop"),
        (lambda: BiasCorrection(images=-1), "images"),
    ],
)
def test_settings_that_make_no_sense_are_named(make: Callable[[], Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.where == field


def test_recipes_name_them_with_their_settings() -> None:
    from slimkit.recipe.schema.methods import build_method
    from slimkit.recipe.stages.quantization import METHOD, PtqStage

    given = ["bias_correction", {"type": "gptq", "images": 32}, {"type": "reconstruct", "drop": 0}]
    stage = PtqStage.model_validate({"type": "ptq", "methods": given})
    built = [build_method(METHOD, choice, {}) for choice in stage.methods]
    assert built == [BiasCorrection(), GPTQ(images=32), Reconstruct(drop=0.0)]
