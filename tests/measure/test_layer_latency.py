"""Time per layer in the runtime, and the warning when MACs fell and milliseconds did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import slimkit as sk
from slimkit.measure.layer_latency import LayerTime, layer_times, least_gained, unrewarded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.up = nn.ConvTranspose2d(24, 8, 2, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(self.up(torch.relu(self.depthwise(x))).mean(dim=(2, 3)))


def test_layers_have_their_names_shapes_and_macs(tmp_path: Path) -> None:
    model, images = Net().eval(), torch.zeros(2, 3, 16, 16)
    sk.export(model, tmp_path / "net.onnx", images)
    found = layer_times(tmp_path / "net.onnx", batch=2, seconds=0.01)
    counted = {layer.name: layer.macs for layer in sk.profile(model, images).layers}
    assert {name: found[name].macs for name in counted} == counted
    assert found["stem"].shape == "3×3, 3→24"
    assert found["depthwise"].shape == "3×3, 24→24 in 24 groups"
    assert found["up"].shape == "2×2, 24→8"
    assert found["head"].shape == "8→10"
    assert found["stem"].size == (16, 16)
    assert all(layer.ms > 0 for layer in found.values())
    assert any(not layer.macs for layer in found.values())  # the pooling


def layer(name: str, ms: float, macs: int, shape: str = "") -> LayerTime:
    return LayerTime(name, "Conv" if macs else "Add", ms, macs, shape, (8, 8))


BEFORE = {
    "fair": layer("fair", 4.0, 4_000_000, "3×3, 64→64"),
    "stuck": layer("stuck", 3.0, 2_000_000, "3×3, 24→24"),
    "sum": layer("sum", 1.0, 0),
}
AFTER = {
    "fair": layer("fair", 2.0, 2_000_000, "3×3, 64→32"),
    "stuck": layer("stuck", 2.9, 1_000_000, "3×3, 24→12"),
    "sum": layer("sum", 0.8, 0),
    "new": layer("new", 9.0, 0),
}


def test_the_layers_that_kept_most_of_their_time_are_named_worst_first() -> None:
    # Half of the MACs went: 1.4 ms too many in "stuck", 0.3 in "sum", none in "fair".
    assert least_gained(BEFORE, AFTER) == [
        "stuck (Conv 3×3, 24→24 now 24→12 on 8×8): 2.00 M → 1.00 M MACs, 3.000 → 2.900 ms",
        "sum (Add on 8×8): no MACs, 1.000 → 0.800 ms",
    ]
    assert len(least_gained(BEFORE, AFTER, 1)) == 1


@pytest.mark.parametrize(
    ("macs", "ms", "warned"),
    [
        ((10, 5), (1.0, 0.80), False),  # −50 % and −20 %: more than a third of it
        ((10, 5), (1.0, 0.85), True),  # −15 % is less
        ((10, 7.9), (1.0, 0.95), True),
        ((10, 8.1), (1.0, 1.0), False),  # −19 % of the MACs are nothing to speak of
        ((10, 5), (1.0, 1.2), True),
        ((0, 0), (1.0, 1.0), False),
    ],
)
def test_a_warning_is_given_when_less_than_a_third_arrives(
    macs: tuple[float, float], ms: tuple[float, float], warned: bool
) -> None:
    text = unrewarded((None, None), macs=macs, ms=ms, backend="onnxruntime")
    assert (text is not None) == warned


def test_the_warning_names_layers_of_the_files(tmp_path: Path) -> None:
    model, images = Net().eval(), torch.zeros(1, 3, 16, 16)
    paths = []
    for name in ("before", "after"):
        paths.append(sk.export(model, tmp_path / f"{name}.onnx", images).path)
        model = sk.apply(model, sk.prune.plan(model, images, macs=0.5)) if not paths[1:] else model
    files = (paths[0], paths[1])
    text = unrewarded(files, macs=(2, 1), ms=(1.0, 0.997), backend="onnxruntime")
    assert text is not None
    assert text.startswith("MACs fell by 50 %, milliseconds did not (1 → 0.997 ms in onnxruntime)")
    elsewhere = unrewarded(files, macs=(2, 1), ms=(1.0, 0.997), backend="openvino")
    assert elsewhere is not None
    assert "least gained" not in elsewhere
    missing = (tmp_path / "none.onnx", paths[1])
    assert unrewarded(missing, macs=(2, 1), ms=(1, 1), backend="onnxruntime") is not None
