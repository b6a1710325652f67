"""Memory of files while they run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import slimkit as sk
from slimkit.measure.memory import running_memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_counted_and_what_cannot_run_is_not(tmp_path: Path) -> None:
    """One process for all three: it takes seconds to start."""
    inner = 3000  # 3000² weights: 36 MB
    for name, width in (("small", 8), ("large", inner)):
        net = nn.Sequential(nn.Linear(inner, width), nn.Linear(width, 1))
        sk.export(net, tmp_path / f"{name}.onnx", torch.zeros(1, inner))
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    found = running_memory(
        {name: tmp_path / f"{name}.onnx" for name in ("small", "large", "broken")}
    )
    assert found["broken"] is None
    assert found["small"] is not None
    assert found["large"] is not None
    assert found["large"] - found["small"] >= 4 * inner * (inner - 8)
    assert found["small"] < 20e6
