from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from slimkit.errors import ArtifactError, ExportError, InputError
from slimkit.runtime.export_hooks import GRAPH_PASSES, TRANSLATIONS
from slimkit.runtime.exporting import export
from slimkit.runtime.output_parity import parity
from slimkit.runtime.sessions import open_session

IMAGE = torch.randn(1, 3, 16, 16)


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, scale: float, right: Tensor) -> dict[str, Tensor]:
        return {"sum": left + scale * right, "product": left * right}


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Opaque:
    pass


class ReturnsOpaque(nn.Module):
    def forward(self, x: Tensor) -> object:
        return {"good": x, "bad": Opaque()}


@torch.library.custom_op("slimkit_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twice(x) + 1


def test_one_file_serves_every_batch_size(residual: nn.Module, residual_path: Path) -> None:
    batches = [torch.randn(size, 3, 16, 16) for size in (1, 3, 8)]
    result = parity(residual, residual_path, batches)
    assert result.samples == 12
    assert result.max_abs_diff <= 1e-5


def test_batch_norm_is_folded_and_pooling_is_global(residual_path: Path) -> None:
    counts = Counter(node.op_type for node in onnx.load(residual_path).graph.node)
    assert counts["BatchNormalization"] == 0
    assert counts["GlobalAveragePool"] == 1
    assert counts["ReduceMean"] == 0


def test_adaptive_pooling_has_no_index_arithmetic(tmp_path: Path) -> None:
    class Pools(nn.Module):
        def forward(self, even: Tensor, odd: Tensor) -> dict[str, Tensor]:
            pool = nn.functional.adaptive_avg_pool2d
            return {
                "mean": pool(even, 1),
                "windows": pool(even, (3, 2)),
                "same": pool(even, 6),
                "uneven": pool(odd, (3, 7)),
            }

    path = tmp_path / "model.onnx"
    even, odd = (torch.randn(2, 3, n, n).to(memory_format=torch.channels_last) for n in (6, 5))
    export(Pools(), path, (even, odd))
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators == {"GlobalAveragePool": 1, "AveragePool": 1, "Identity": 1, "MatMul": 2}
    result = parity(Pools(), path, [(even, odd), (even[:1], odd[:1])])
    assert result.max_abs_diff <= 1e-6


def test_nodes_carry_the_paths_of_their_modules(residual_path: Path) -> None:
    graph = onnx.load(residual_path).graph
    names = {node.op_type: node.name for node in graph.node}
    assert [n.name for n in graph.node if n.op_type == "Conv"] == ["stem.0", "conv"]
    assert names["Gemm"] == "fc"
    assert names["GlobalAveragePool"] == "pool/GlobalAveragePool"
    assert "stem.0.weight" in {item.name for item in graph.initializer}
    assert len({node.name for node in graph.node}) == len(graph.node)


def test_a_file_is_hardly_larger_than_its_weights(residual: nn.Module, residual_path: Path) -> None:
    weights = 4 * sum(parameter.numel() for parameter in residual.parameters())
    assert residual_path.stat().st_size - weights <= 1_300
    assert [entry.name for entry in residual_path.parent.iterdir()] == ["model.onnx"]
    assert Path(__file__).parent.name.encode() not in residual_path.read_bytes()


def test_inputs_and_outputs_are_named_after_the_code(tmp_path: Path) -> None:
    left, right = torch.randn(2, 4), torch.randn(2, 4)
    path = tmp_path / "model.onnx"
    result = export(TwoInputs(), path, (left, 3.0, right))
    assert [spec.name for spec in result.inputs] == ["left", "right"]
    assert [spec.name for spec in result.outputs] == ["sum", "product"]
    session = open_session(path)
    a, b = np.ones((5, 4), np.float32), np.full((5, 4), 2, np.float32)
    total, product = session.run({"right": b, "left": a})
    np.testing.assert_allclose(total, a + 3 * b)
    np.testing.assert_allclose(product, a * b)


def test_names_and_metadata_are_the_callers(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export(
        nn.Linear(3, 2),
        path,
        torch.randn(1, 3),
        input_names=["pixels"],
        output_names=["scores"],
        metadata={"preprocessing": "{}"},
    )
    model = onnx.load(path)
    assert model.graph.input[0].name == "pixels"
    assert model.graph.output[0].name == "scores"
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert entries["preprocessing"] == "{}"
    assert "slimkit_version" in entries


def test_training_flags_are_as_before(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    statistics = model[1].running_mean.clone()
    export(model, tmp_path / "model.onnx", IMAGE)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model[1].running_mean, statistics)
    with pytest.raises(ExportError):
        export(model, tmp_path / "model.onnx", torch.randn(1, 5, 16, 16))
    assert [module.training for module in model.modules()] == before


def test_a_model_on_any_device_gives_the_same_file(
    residual: nn.Module, residual_path: Path, device: torch.device, tmp_path: Path
) -> None:
    model = residual.to(device)
    try:
        export(model, tmp_path / "model.onnx", IMAGE)
    finally:
        residual.to("cpu")
    ours, theirs = (
        {i.name: numpy_helper.to_array(i) for i in onnx.load(p).graph.initializer}
        for p in (residual_path, tmp_path / "model.onnx")
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_forward_for_one_batch_size_needs_a_fixed_batch(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match="one batch size only") as caught:
        export(FixedBatch(), path, torch.randn(2, 3, 4))
    assert "dynamic_batch=False" in str(caught.value)
    assert not path.exists()
    result = export(FixedBatch(), path, torch.randn(2, 3, 4), dynamic_batch=False)
    assert result.inputs[0].shape == (2, 3, 4)


def test_a_list_of_images_has_no_batch_dimension(tmp_path: Path) -> None:
    class Largest(nn.Module):
        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return [image.amax((1, 2)) for image in images]

    images = ([torch.randn(3, 8, 8), torch.randn(3, 6, 6)],)
    with pytest.raises(ExportError, match="dynamic_batch=False"):
        export(Largest(), tmp_path / "model.onnx", images)
    result = export(Largest(), tmp_path / "model.onnx", images, dynamic_batch=False)
    assert [spec.shape for spec in result.inputs] == [(3, 8, 8), (3, 6, 6)]
    assert [spec.name for spec in result.outputs] == ["output0", "output1"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (ByValue(), "values of tensors"),
        (Twice(), "slimkit_test.twice.* has no ONNX translation"),
        (ReturnsOpaque(), "Opaque"),
        (nn.Linear(5, 2), "fails on the example inputs"),
    ],
)
def test_what_cannot_be_exported_says_why(tmp_path: Path, model: nn.Module, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        export(model, tmp_path / "model.onnx", torch.randn(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_input_errors(tmp_path: Path) -> None:
    model, path, x = nn.Linear(3, 2), tmp_path / "model.onnx", torch.randn(1, 3)
    with pytest.raises(InputError, match=r"\.onnx"):
        export(model, tmp_path / "model.pt", x)
    with pytest.raises(InputError, match="opset"):
        export(model, path, x, opset=9)
    with pytest.raises(InputError, match="input_names"):
        export(model, path, x, input_names=["a", "b"])
    with pytest.raises(InputError, match="unique"):
        export(model, path, x, input_names=["a"], output_names=["a"])
    with pytest.raises(InputError, match="metadata"):
        export(model, path, x, metadata={"size": 32})  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        export(torch.relu, path, x)  # type: ignore[arg-type]


def test_an_unwritable_place_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError):
        export(nn.Identity(), tmp_path / "file" / "model.onnx", torch.randn(1, 3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_rooms_add_operators_and_graph_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxscript import opset18

    with TRANSLATIONS.scratch(), GRAPH_PASSES.scratch():
        TRANSLATIONS.register("slimkit_test::twice")(lambda x: opset18.Add(x, x))

        def mark(model: onnx.ModelProto) -> None:
            assert model.graph.value_info, "shapes are still there"
            for node in model.graph.node:
                if node.op_type == "Add" and node.input[0] == node.input[1]:
                    node.op_type = "Mul"

        GRAPH_PASSES.register("99_test")(mark)
        export(Twice(), tmp_path / "model.onnx", torch.randn(1, 3))
        (got,) = open_session(tmp_path / "model.onnx").run([np.full((2, 3), 3, np.float32)])
        np.testing.assert_allclose(got, np.full((2, 3), 10))


class Attention(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, 2 * x, x + 1, mask)


@pytest.mark.parametrize(
    ("shape", "mask"), [((3, 4, 8), (4, 4)), ((2, 3, 2, 4, 8), (3, 1, 4, 4)), ((4, 8), (4, 4))]
)
def test_attention_over_any_leading_dimensions(
    shape: tuple[int, ...], mask: tuple[int, ...], tmp_path: Path
) -> None:
    inputs = (torch.randn(shape), torch.randn(mask))
    export(Attention(), tmp_path / "a.onnx", inputs, dynamic_batch=False)
    feeds = [tensor.numpy() for tensor in inputs]
    (out,) = open_session(tmp_path / "a.onnx").run(feeds)
    torch.testing.assert_close(torch.from_numpy(out), Attention()(*inputs), atol=1e-5, rtol=1e-5)
