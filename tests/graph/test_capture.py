from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock

from slimkit.errors import CaptureError, InputError
from slimkit.graph import AddressMode, Inputs, capture, function_name


class Everything(nn.Module):
    """One of each way to call something."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)])
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor, *, gate: Tensor) -> dict[str, list[Tensor]]:
        for block in self.blocks:
            x = self.relu(self.norm(block(x)))
        y = x + gate
        y += x
        y = F.dropout(y, 0.5, training=self.training)
        first, second = y.chunk(2, dim=1)
        tokens = torch.cat([second, first], 1).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return {"classes": [self.head(tokens.mean(1)), tokens[:, 0]]}


@pytest.fixture
def example(device: torch.device) -> tuple[nn.Module, Inputs]:
    model = Everything().to(device)
    x = torch.randn(2, 3, 4, 4, device=device)
    return model, Inputs((x,), {"gate": torch.randn(2, 4, 1, 1, device=device)})


def addresses_in_training(model: nn.Module, inputs: Inputs) -> list[str]:
    class Recording(AddressMode):
        def on_call(self, address, func, args, kwargs):
            seen.append(address)
            return func(*args, **kwargs)

    seen: list[str] = []
    with Recording(model.train()):
        inputs.call(model)
    return seen


def test_calls_and_operators_are_recorded_in_order(example) -> None:
    model, inputs = example
    graph = capture(model, inputs)
    addresses = [call.address for call in graph.calls]
    assert addresses[:3] == ["blocks.0:conv2d#0", "norm:batch_norm#0", "relu:relu#0"]
    assert "norm:batch_norm#1" in addresses
    assert ":add#1" in addresses  # y += x is an addition like y = x + gate
    assert "attention:scaled_dot_product_attention#0" in addresses  # no fused fast path
    assert sum(a.startswith("attention:linear") for a in addresses) == 2
    assert graph.ops[0].name == "aten.convolution.default"
    assert graph.ops[0].module == "blocks.0"
    assert graph.calls[graph.ops[0].call].function == "conv2d"
    assert len(graph.outputs) == 2
    assert graph.tensors[graph.outputs[0]].shape == (2, 5)
    assert [graph.tensors[v].shape for v in graph.inputs] == [(2, 3, 4, 4), (2, 4, 1, 1)]


def test_values_connect_producers_and_consumers(example) -> None:
    model, inputs = example
    graph = capture(model, inputs)
    conv, norm, relu = graph.calls[:3]
    assert graph.call_producer(norm.inputs[0]) is conv
    assert graph.call_consumers(conv.outputs[0]) == [norm]
    # The in-place ReLU makes a new value; what it overwrote is read by nobody else.
    assert relu.outputs != relu.inputs
    assert graph.call_consumers(norm.outputs[0]) == [relu]
    weight = graph.parameters["blocks.0.weight"]
    assert graph.tensors[weight].name == "blocks.0.weight"
    assert [op.name for op in graph.consumers(weight)] == ["aten.convolution.default"]
    assert graph.producer(weight) is None


def test_dropout_in_evaluation_hands_its_input_on(example) -> None:
    model, inputs = example
    graph = capture(model, inputs)
    dropout = next(call for call in graph.calls if call.function == "dropout")
    assert dropout.inputs == dropout.outputs
    assert graph.call_producer(dropout.outputs[0]).function == "add"
    assert [c.function for c in graph.call_consumers(dropout.outputs[0])] == ["chunk"]


def test_addresses_are_the_same_in_training(example) -> None:
    model, inputs = example
    graph = capture(model, inputs)
    seen = addresses_in_training(model, inputs)
    assert [c.address for c in graph.calls if c.address not in seen] == []
    assert seen == addresses_in_training(model, inputs)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_addresses_of_known_networks_are_the_same_in_training(name: str) -> None:
    model, x = get_model(name, num_classes=2), torch.randn(2, 3, 64, 64)
    captured = [call.address for call in capture(model, x).calls]
    assert len(set(captured)) == len(captured)
    assert set(captured) <= set(addresses_in_training(model, Inputs((x,))))


def test_addresses_survive_export() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    model = nn.Sequential(stem, BasicBlock(8, 8), BasicBlock(8, 8)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = [call.address for call in capture(model, x).calls]

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            class Mode(AddressMode):
                def on_call(self, address, func, args, kwargs):
                    seen.append(address)
                    result = func(*args, **kwargs)
                    return result * 2 if ":conv2d#" in address else result

            with Mode(self.model):
                return self.model(x)

    seen: list[str] = []
    program = torch.export.export(Doubled(), (x,), strict=False)
    assert set(expected) <= set(seen)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("aten.mul.Tensor") == 5
    torch.testing.assert_close(program.module()(x), Doubled()(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (F.relu, "relu"),
        (torch.relu_, "relu"),
        (torch.Tensor.relu_, "relu"),
        (torch.Tensor.__add__, "add"),
        (torch.Tensor.__iadd__, "add"),
        (torch.Tensor.__getitem__, "getitem"),
        (torch.ops.aten.relu.default, "relu"),
        (torch.Tensor.T.__get__, "T"),
        (torch.conv2d, "conv2d"),
    ],
)
def test_spellings_of_a_function_have_one_name(func, name: str) -> None:
    assert function_name(func) == name


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("runs", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.latest = x.mean()[None]
        return self.conv(x) + torch.rand(())


def test_capture_leaves_the_model_as_it_was() -> None:
    model = Counting().train()
    model.conv.eval()
    before = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())
    x, state = torch.randn(1, 3, 2, 2), torch.get_rng_state()
    capture(model, x)
    assert model.training
    assert not model.conv.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.conv._forward_hooks


def test_an_in_place_operator_on_the_input_does_not_reach_the_users_tensor() -> None:
    x = -torch.ones(1, 3, 4, 4)
    capture(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)), x)
    assert bool((x == -1).all())


def test_tied_parameters_share_a_value() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    graph = capture(model, torch.randn(1, 4))
    assert graph.parameters["0.weight"] == graph.parameters["2.weight"]
    assert graph.aliases == {"0.weight": ["0.weight", "2.weight"]}


def test_a_failing_forward_names_the_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1)))
    with pytest.raises(CaptureError, match=r"1\.1: .*RuntimeError") as caught:
        capture(model, torch.randn(1, 3, 4, 4))
    assert caught.value.where == "1.1"
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(InputError, match="no tensor"):
        capture(model, ())


@dataclass
class Result:
    boxes: list[Tensor]
    score: Tensor


def test_outputs_in_any_container_are_found() -> None:
    class Model(nn.Module):
        def forward(self, images: list[Tensor]) -> Result:
            return Result([image * 2 for image in images], images[0].sum())

    graph = capture(Model(), ([torch.randn(3, 2, 2), torch.randn(3, 4, 4)],))
    assert [graph.tensors[v].shape for v in graph.outputs] == [(3, 2, 2), (3, 4, 4), ()]
