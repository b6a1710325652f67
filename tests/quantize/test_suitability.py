"""A network that cannot be quantized says so, and says what to convert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from slimkit.errors import InputError, PlanError
from slimkit.quantize import ptq, qat

X = torch.randn(4, 3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 5)).eval()


@pytest.mark.parametrize("quantize", [ptq, qat])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_than_float32_name_the_remedy(quantize: Any, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    with pytest.raises(InputError, match=r"0\.weight.*model\.float\(\)") as caught:
        quantize(net().to(dtype), x, calibration=[x])
    assert str(dtype).removeprefix("torch.") in str(caught.value)


def test_a_single_layer_of_another_type_is_named() -> None:
    model = net()
    model[3].double()  # type: ignore[index]
    with pytest.raises(InputError, match=r"3\.weight, 3\.bias"):
        ptq(model, X, calibration=[X])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("quantize", [ptq, qat])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_asks_for_the_eager_module(quantize: Any, how: str) -> None:
    compiled = torch.jit.script(net()) if how == "script" else torch.jit.trace(net(), X)
    with pytest.raises(InputError, match="eager"):
        quantize(compiled, X, calibration=[X])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", ["static", "dynamic", "weights"])
def test_what_surrounds_torchscript_is_quantized(mode: str) -> None:
    inner = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval())
    model = nn.Sequential(inner, nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 4)).eval()
    q = ptq(model, X, calibration=[X], mode=mode, methods=[])
    weights = {spec.parameter for spec in q.plan.quantizers if spec.parameter}
    assert weights == {"1.weight", "3.weight"}
    assert any(text.startswith("0: TorchScript stays in float") for text in q.plan.warnings)
    with torch.no_grad():
        assert torch.allclose(q(X), model(X), atol=0.05)
        assert not torch.equal(q(X), model(X))


def test_nothing_to_quantize_is_an_error_with_the_reasons() -> None:
    with pytest.raises(PlanError, match="no layer of the network is quantized: 0"):
        ptq(nn.Sequential(nn.Sigmoid()), X, calibration=[X])


def test_nothing_left_by_the_user_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="no layer of the network is quantized"):
        quantized = ptq(net(), X, calibration=[X], skip=["0", "3"])
    assert any("no layer" in warning for warning in quantized.plan.warnings)
