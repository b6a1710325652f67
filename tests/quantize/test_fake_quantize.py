from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from slimkit.runtime.fake_quantize import fake_quantize, quantized_integers


def onnx_reference(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int | None
) -> list[np.ndarray]:
    """Integers and values by ONNX's own reference implementation."""
    kind = TensorProto.UINT8 if zero_point.dtype == np.uint8 else TensorProto.INT8
    extra = {} if axis is None else {"axis": axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **extra),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **extra),
        ],
        "pair",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, scale.shape),
            helper.make_tensor_value_info("z", kind, zero_point.shape),
        ],
        [
            helper.make_tensor_value_info("q", kind, x.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, {"x": x, "s": scale, "z": zero_point})


@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_equals_onnx_per_tensor_also_at_ties_and_beyond_the_range(
    zero_point: int, device: torch.device
) -> None:
    scale = torch.tensor(0.25, device=device)
    x = torch.cat([torch.arange(-600, 600) * 0.125, torch.randn(500) * 40]).to(device)
    point = torch.tensor(zero_point, dtype=torch.int32, device=device)
    integers, values = onnx_reference(
        x.cpu().numpy(), np.float32(0.25), np.asarray(zero_point, np.uint8), None
    )
    ours = fake_quantize(x, scale, point, qmin=0, qmax=255)
    assert np.array_equal(ours.cpu().numpy(), values)
    mine = quantized_integers(x, scale, point, qmin=0, qmax=255)
    assert np.array_equal(mine.cpu().numpy(), integers)


def test_equals_onnx_per_channel_with_odd_scales(device: torch.device) -> None:
    weight = torch.randn(6, 5, 3, 3)
    scale = weight.abs().amax((1, 2, 3)) / 127
    zeros = torch.zeros(6, dtype=torch.int32)
    _, values = onnx_reference(weight.numpy(), scale.numpy(), np.zeros(6, np.int8), 0)
    ours = fake_quantize(
        weight.to(device), scale.to(device), zeros.to(device), qmin=-127, qmax=127, axis=0
    )
    assert np.array_equal(ours.cpu().numpy(), values)


def test_halves_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    zero = torch.tensor(0, dtype=torch.int32)
    y = fake_quantize(x, torch.tensor(1.0), zero, qmin=-127, qmax=127)
    assert y.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]


def test_gradient_passes_inside_the_range_and_stops_outside(device: torch.device) -> None:
    scale = torch.tensor(0.1, device=device)
    zero_point = torch.tensor(10, dtype=torch.int32, device=device)  # represents −1.0 … 24.5
    x = torch.tensor([-2.0, -1.0, 0.03, 24.4, 24.6], device=device, requires_grad=True)
    y = fake_quantize(x, scale, zero_point, qmin=0, qmax=255)
    y.backward(torch.arange(1.0, 6.0, device=device))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


def test_gradient_per_channel() -> None:
    x = torch.tensor([[1.0, -3.0], [1.0, -3.0]], requires_grad=True)
    zeros = torch.zeros(2, dtype=torch.int32)
    scale = torch.tensor([1.0 / 127, 3.0 / 127])
    fake_quantize(x, scale, zeros, qmin=-127, qmax=127, axis=0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_changing_the_scale_between_forward_and_backward_is_allowed() -> None:
    scale, zero = torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)
    x = torch.tensor([1.0, 30.0], requires_grad=True)
    y = fake_quantize(x, scale, zero, qmin=0, qmax=255)
    scale.fill_(1.0)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0]


def test_the_exported_operator_is_a_sound_custom_operator() -> None:
    arguments = (
        torch.randn(2, 3, requires_grad=True),
        torch.rand(3) + 0.1,
        torch.zeros(3, dtype=torch.int32),
        1,
        -127,
        127,
    )
    checks = ("test_schema", "test_faketensor")  # those that trace with a compiler take 20 s
    torch.library.opcheck(torch.ops.slimkit.fake_quantize.default, arguments, test_utils=checks)
    x = arguments[0]
    plain = fake_quantize(*arguments[:3], axis=1, qmin=-127, qmax=127)
    exported = torch.ops.slimkit.fake_quantize(*arguments)
    assert torch.equal(plain, exported)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (plain, exported)]
    assert torch.equal(*gradients)


def test_shorter_types_keep_their_type_and_layout() -> None:
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    scale, zero = torch.tensor(0.02), torch.tensor(0, dtype=torch.int32)
    assert fake_quantize(x, scale, zero, qmin=-127, qmax=127).is_contiguous(
        memory_format=torch.channels_last
    )
    half = fake_quantize(x.bfloat16(), scale, zero, qmin=-127, qmax=127)
    assert half.dtype == torch.bfloat16
