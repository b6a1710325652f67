"""Memory of files while they run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slimkit.measure.memory import running_memory

WIDTH = 2000


def _product(path: Path, columns: int) -> Path:
    """A file of one matrix product: 4 · WIDTH · columns bytes of weights."""
    weight = numpy_helper.from_array(np.ones((WIDTH, columns), np.float32), "weight")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
        for name, size in (("input", WIDTH), ("output", columns))
    ]
    node = helper.make_node("MatMul", ["input", "weight"], ["output"])
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [weight])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), str(path))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_counted_and_what_cannot_run_is_not(tmp_path: Path) -> None:
    """One process for all three: it takes seconds to start."""
    files = {"small": _product(tmp_path / "small.onnx", 8)}
    files["large"] = _product(tmp_path / "large.onnx", WIDTH)
    files["broken"] = tmp_path / "broken.onnx"
    files["broken"].write_bytes(b"no model")
    found = running_memory(files)
    assert found["broken"] is None
    assert found["small"] is not None
    assert found["large"] is not None
    assert found["large"] - found["small"] >= 0.95 * 4 * WIDTH * WIDTH
    assert found["small"] < 15e6
