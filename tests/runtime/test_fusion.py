from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from slimkit.errors import ArtifactError, BackendError
from slimkit.runtime.fusion import fusion_report


def test_a_float_file_runs_in_float_and_every_layer_is_named(residual_path: Path) -> None:
    report = fusion_report(residual_path)
    assert (report.convs, report.linears, report.adds) == (2, 1, 1)
    assert (report.integer_convs, report.integer_linears, report.integer_adds) == (0, 0, 0)
    assert {"stem.0", "conv", "fc"} <= {node.name for node in report.float_nodes}
    assert not report.complete


def test_a_well_formed_qdq_file_runs_in_integers(quantized_path: Path) -> None:
    report = fusion_report(quantized_path)
    assert (report.convs, report.integer_convs) == (1, 1)
    assert (report.linears, report.integer_linears) == (1, 1)
    assert report.float_nodes == ()
    assert report.complete
    assert report.quantizers == 2, "one Q at the input, one DQ at the output"
    assert "1/1 convolutions" in str(report)
    json.dumps(report.to_json())


def test_a_missing_pair_is_reported_as_a_float_layer(quantized_path: Path, tmp_path: Path) -> None:
    model = onnx.load(quantized_path)
    nodes = {node.output[0]: node for node in model.graph.node}
    nodes["c"].input[0] = "input"  # past the Q/DQ pair before the convolution
    for name in ("xq", "xf"):
        model.graph.node.remove(nodes[name])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    report = fusion_report(path)
    assert (report.convs, report.integer_convs) == (1, 0)
    assert "features.conv" in {node.name for node in report.float_nodes}
    assert not report.complete


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ArtifactError):
        fusion_report(path)
    path.write_bytes(b"this is not a model")
    with pytest.raises(BackendError):
        fusion_report(path)
