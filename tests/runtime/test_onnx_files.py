from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import slimkit as sk
from slimkit.errors import ArtifactError, BackendError
from slimkit.runtime import onnx_files
from slimkit.runtime.exporting import export
from slimkit.runtime.fusion import fusion_report
from slimkit.runtime.layer_parity import parity_per_layer
from slimkit.runtime.onnx_files import file_bytes, load_onnx, model_files
from slimkit.runtime.output_parity import parity
from slimkit.runtime.sessions import available_backends, open_session

X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "PROTOBUF_LIMIT", 10_000)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 36, 10)).eval()


@pytest.mark.usefixtures("low_limit")
def test_large_weights_lie_beside_the_file(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    written = export(net, path, X, metadata={"preprocessing": "{}"})
    assert [file.name for file in written.files] == ["net.onnx", "net.onnx.data"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    sizes = [file.stat().st_size for file in written.files]
    assert sizes[0] < 10_000
    assert sizes[1] >= 4 * sum(p.numel() for p in net.parameters() if p.numel() > 256)
    assert written.bytes == sum(sizes) == file_bytes(path)
    assert {e.key: e.value for e in load_onnx(path).metadata_props}["preprocessing"] == "{}"
    assert parity(net, path, [X, X[:1]]).max_abs_diff < 1e-4
    assert fusion_report(path).convs == 2
    if available_backends()["openvino"].version:
        assert parity(net, path, [X], backend="openvino").max_abs_diff < 1e-4


@pytest.mark.usefixtures("low_limit")
def test_quantized_networks_too(net: nn.Module, tmp_path: Path) -> None:
    q = sk.quantize.ptq(net, X, calibration=[X])
    path = tmp_path / "net.onnx"
    assert len(export(q, path, X).files) == 2
    assert parity(q, path, [X]).sqnr_db > 30
    assert fusion_report(path).integer_convs == 2
    layers = parity_per_layer(path, [X])
    assert len(layers.layers) == 2
    assert layers.within_one == 1


def test_one_file_again_takes_the_old_data_away(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(onnx_files, "PROTOBUF_LIMIT", 10_000)
        export(net, path, X)
    stranger = tmp_path / "other.onnx.data"
    stranger.write_bytes(b"not ours")
    export(net, tmp_path / "other.onnx", X)
    assert stranger.read_bytes() == b"not ours"
    export(net, path, X)
    assert model_files(path) == (path,)
    assert not (tmp_path / "net.onnx.data").exists()
    assert parity(net, path, [X]).max_abs_diff < 1e-4


@pytest.mark.usefixtures("low_limit")
def test_missing_data_is_named(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export(net, path, X)
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"net\.onnx\.data is missing"):
        open_session(path)
    with pytest.raises(ArtifactError, match=r"net\.onnx\.data is missing"):
        load_onnx(path, weights=True)
    with pytest.raises(ArtifactError, match="no such file"):
        file_bytes(path)
    (tmp_path / "net.onnx.data").write_bytes(b"short")
    with pytest.raises(BackendError):
        load_onnx(path, weights=True)


@pytest.mark.usefixtures("low_limit")
def test_a_failed_export_leaves_the_old_pair(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export(net, path, X)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(sk.SlimkitError, match="not valid"):
        onnx_files.write_onnx(model, path, check=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("low_limit")
def test_the_pair_moves_to_other_folders(net: nn.Module, tmp_path: Path) -> None:
    export(net, tmp_path / "net.onnx", X)
    target = tmp_path / "elsewhere" / "net.onnx"
    onnx_files.copy_model(tmp_path / "net.onnx", target)
    (got,) = open_session(target).run([X.numpy()])
    np.testing.assert_allclose(got, net(X).detach().numpy(), atol=1e-4)
