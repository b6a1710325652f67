from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from slimkit.errors import (
    ArtifactError,
    BackendError,
    InputError,
    MissingDependencyError,
    UnknownNameError,
)
from slimkit.runtime.output_parity import parity
from slimkit.runtime.sessions import BACKENDS, Backend, available_backends, open_session
from slimkit.runtime.surroundings import environment, int8_advice


def test_a_session_says_what_it_takes_and_returns(residual_path: Path) -> None:
    session = open_session(residual_path)
    assert session.inputs[0].name == "input"
    assert session.inputs[0].shape == (None, 3, 16, 16)
    assert session.inputs[0].dtype == "float32"
    assert session.output_names == ("logits",)


def test_openvino_agrees_with_torch(residual: nn.Module, residual_path: Path) -> None:
    pytest.importorskip("openvino", reason="the openvino extra is not installed")
    batches = [torch.randn(size, 3, 16, 16) for size in (1, 3)]
    result = parity(residual, residual_path, batches, backend="openvino")
    assert result.backend == "openvino"
    assert result.passed("fp32"), result.problems("fp32")
    assert open_session(residual_path, backend="openvino").inputs == (
        open_session(residual_path).inputs
    )


def test_openvino_prepares_for_the_shapes_of_the_inputs(residual_path: Path) -> None:
    pytest.importorskip("openvino", reason="the openvino extra is not installed")
    session = open_session(residual_path, backend="openvino")
    for size in (1, 3):
        batch = np.random.default_rng(size).normal(size=(size, 3, 16, 16)).astype(np.float32)
        (found,) = cast("Any", session.prepare([batch])()).values()
        (expected,) = session.run([batch])
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"inptu": np.zeros((1, 3, 16, 16), np.float32)}, "did you mean 'input'"),
        ({}, "missing: input"),
        ([np.zeros((1, 3, 16, 16), np.float64)], "float64"),
        ([np.zeros((1, 3, 16, 15), np.float32)], r"\('any', 3, 16, 16\)"),
        ([], "takes 1 inputs"),
    ],
)
def test_feeds_that_do_not_fit_are_named(residual_path: Path, inputs: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_session(residual_path).run(inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", sorted(available_backends()))
def test_damaged_and_missing_files_are_told_apart(
    tmp_path: Path, residual_path: Path, backend: str
) -> None:
    if available_backends()[backend].version is None:
        pytest.skip(f"{backend} is not installed")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(residual_path.read_bytes()[:500])
    with pytest.raises(BackendError, match=r"damaged\.onnx"):
        open_session(damaged, backend=backend)
    with pytest.raises(ArtifactError, match="no such file"):
        open_session(tmp_path / "absent.onnx", backend=backend)


def test_wrong_backends_and_threads(residual_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        open_session(residual_path, backend="onnxruntim")
    with pytest.raises(InputError, match="threads"):
        open_session(residual_path, threads=0)
    with BACKENDS.scratch():
        absent = Backend("no-such-distribution", "pip install it", BACKENDS.get("onnxruntime").open)
        BACKENDS.register("absent")(absent)
        assert available_backends()["absent"].version is None
        with pytest.raises(MissingDependencyError, match="pip install it"):
            open_session(residual_path, backend="absent")


def test_the_environment_names_cpu_and_backends() -> None:
    facts = environment()
    assert facts["cpu"]["cores"] >= 1
    assert facts["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["backends"]["onnxruntime"]["version"]


def test_int8_advice_warns_of_saturation_without_dot_products() -> None:
    assert "saturate" in int8_advice(["AVX2", "FMA"])
    assert "saturate" in int8_advice(["AVX2", "AVX-512"])
    assert "exact" in int8_advice(["AVX2", "AVX-VNNI"])
    assert "measure" in int8_advice([])
