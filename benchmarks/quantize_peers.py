"""ONNX Runtime's and NNCF's quantizers, as the quantization benchmarks call them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["nncf_onnx", "nncf_openvino", "ort_static"]


class _Reader:
    """ONNX Runtime's way to be handed calibration data."""

    def __init__(self, name: str, images: Tensor) -> None:
        self._batches: Iterator[dict[str, Any]] = iter(
            [{name: image.numpy()} for image in images.split(1)]
        )

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None."""
        return next(self._batches, None)


def ort_static(
    float_file: Path,
    out: Path,
    images: Tensor,
    *,
    per_channel: bool = True,
    method: str = "MinMax",
    reduce_range: bool = False,
) -> Path:
    """``onnxruntime.quantization.quantize_static`` after its own preprocessing, QDQ, u8 × s8."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(float_file), str(prepared))
    quantize_static(
        str(prepared),
        str(out),
        _Reader(_input_name(prepared), images),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
    )
    prepared.unlink()
    return out


def nncf_onnx(
    float_file: Path, out: Path, images: Tensor, *, overflow_fix: str | None = None
) -> Path:
    """``nncf.quantize`` of an ONNX file; ``overflow_fix``: ``"enable"`` halves all weights."""
    import nncf
    import onnx
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    nncf.set_log_level(logging.ERROR)
    name = _input_name(float_file)
    advanced = None
    if overflow_fix is not None:
        advanced = AdvancedQuantizationParameters(overflow_fix=OverflowFix(overflow_fix))
    quantized = nncf.quantize(
        onnx.load(str(float_file)),
        nncf.Dataset([{name: image.numpy()} for image in images.split(1)]),
        subset_size=len(images),
        advanced_parameters=advanced,
    )
    onnx.save(quantized, str(out))
    return out


def nncf_openvino(model: Any, out: Path, images: Tensor) -> Path:
    """``nncf.quantize`` of a PyTorch network, converted to OpenVINO's own format (``.xml``)."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    quantized = nncf.quantize(model, nncf.Dataset(list(images.split(1))), subset_size=len(images))
    shape = tuple(images[:1].shape)
    converted = openvino.convert_model(quantized, example_input=images[:1], input=[shape])
    openvino.save_model(converted, str(out), compress_to_fp16=False)
    return out


def _input_name(file: Path) -> str:
    import onnx

    return str(onnx.load(str(file), load_external_data=False).graph.input[0].name)
