from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimkit.errors import InputError
from slimkit.graph.capturing import capture
from slimkit.quantize import ptq
from slimkit.quantize.methods.smoothing import SmoothQuant, norms


class WrittenOut(nn.Module):
    """RMSNorm as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """A transformer block whose three projections read one norm; another norm before the MLP."""

    def __init__(self, norm: str, width: int = 32) -> None:
        super().__init__()
        kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "written": WrittenOut}
        self.norm1, self.norm2 = kinds[norm](width), kinds[norm](width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        attention = torch.softmax(self.q(h) @ self.k(h).mT / 6.0, -1) @ self.v(h)
        x = x + self.out(attention)
        h = self.norm2(x).flatten(0, 1)
        return x + self.fc2(nn.functional.gelu(self.fc1(h))).view_as(x)


def with_outliers(norm: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Block(norm).eval()
    with torch.no_grad():
        for layer in (model.norm1, model.norm2):
            layer.weight[[3, 17]] *= 60.0
            if isinstance(layer, nn.LayerNorm):
                layer.bias[3] = 20.0
    return model


def test_norms_and_their_readers_are_found() -> None:
    for norm in ("layer", "rms", "written"):
        found = norms(capture(Block(norm).eval(), torch.randn(2, 5, 32)))
        modules = [[layer.call.module for layer in entry.layers] for entry in found]
        assert modules == [["q", "k", "v"], ["fc1"]]
    assert len(norms(capture(Block("layer").eval(), torch.randn(2, 5, 32)))[0].parameters) == 2


class Elsewhere(nn.Module):
    """The result of a norm that something else than linear layers reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.fc(h) + h


def test_a_norm_with_other_readers_is_left_alone() -> None:
    x = torch.randn(2, 8)
    assert norms(capture(Elsewhere(), x)) == []
    with pytest.warns(UserWarning, match="no normalisation"):
        ptq(Elsewhere(), x, calibration=[x], methods=["smoothquant"])


@settings(max_examples=15)
@given(
    seed=st.integers(0, 1000),
    norm=st.sampled_from(["layer", "rms", "written"]),
    alpha=st.floats(0.0, 1.0),
)
def test_the_float_function_stays(seed: int, norm: str, alpha: float) -> None:
    model = with_outliers(norm, seed)
    x = torch.randn(4, 6, 32)
    q = ptq(model, x[:1], calibration=[x], methods=[SmoothQuant(alpha)])
    other = torch.randn(4, 6, 32)
    with torch.no_grad():
        torch.testing.assert_close(q.model(other), model(other), rtol=1e-3, atol=1e-3)
    assert not torch.equal(q.model.get_parameter("q.weight"), model.get_parameter("q.weight"))


def test_equation_4_by_hand() -> None:
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([16.0, 1.0]))
        model[1].weight.copy_(torch.tensor([[0.25, 0.25]]))
    x = torch.tensor([[1.0, -1.0]])  # normalised to ±1
    q = ptq(model, x, calibration=[x], methods=["smoothquant"])
    # s = sqrt(16 / 0.25), sqrt(1 / 0.25) = 8, 2, by their mean 4: 2, 1/2
    weights = [q.model.get_parameter(name) for name in ("0.weight", "1.weight")]
    torch.testing.assert_close(weights[0], torch.tensor([8.0, 2.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights[1], torch.tensor([[0.5, 0.125]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["layer", "written"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_outlier_channels_cost_less(norm: str, granularity: str) -> None:
    model = with_outliers(norm)
    data = [torch.randn(8, 6, 32) for _ in range(2)]
    x = torch.randn(8, 6, 32)

    def error(methods: list[str]) -> float:
        choices = {"granularity": granularity, "target": "onnxruntime-vnni"}  # on every processor
        q = ptq(model, x[:1], calibration=data, methods=methods, **choices)
        with torch.no_grad():
            return float((q(x) - model(x)).square().mean())

    assert error(["smoothquant"]) < 0.5 * error([])


def test_attention_modules_are_smoothed_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    names = [[e.call.module for e in n.layers] for n in norms(capture(layer, x))]
    assert names == [["self_attn"], ["linear1"]]
    q = ptq(layer, x, calibration=[x], methods=["smoothquant"])
    with torch.no_grad():
        torch.testing.assert_close(q.model(x), layer(x), rtol=1e-4, atol=1e-5)
    name = "self_attn.in_proj_weight"
    assert not torch.equal(q.model.get_parameter(name), layer.get_parameter(name))


def test_alpha_is_checked() -> None:
    with pytest.raises(InputError, match="alpha"):
        SmoothQuant(1.5)
