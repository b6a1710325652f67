"""From a PyTorch network to one small, checked ONNX file."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import slimkit
from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.errors import ExportError, InputError
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.modules import evaluation, set_evaluation
from slimkit.runtime.dynamic_axes import (
    Axes,
    DynamicAxes,
    checked_axes,
    fixed,
    name_axes,
    specialized,
    symbolic,
    try_out,
)
from slimkit.runtime.export_hooks import GRAPH_PASSES, translation_table
from slimkit.runtime.export_state import exporting
from slimkit.runtime.onnx_files import write_onnx
from slimkit.runtime.sessions import TensorSpec
from slimkit.runtime.structure import (
    FlatModel,
    batched_positions,
    default_input_names,
    default_output_names,
    in_signature_order,
    named_outputs,
)

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

__all__ = ["OPSETS", "ExportResult", "export"]

OPSETS = range(18, 24)
"""Opset versions that the exporter writes and ONNX Runtime reads."""
_CHATTER = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size, external data included.
        opset: ONNX operator set version.
        inputs: name, shape (None = any size), dtype and names of open dimensions of every input.
        outputs: the same for the outputs, in the order of the model's own.
        files: ``path`` and, of a model beyond 2 GiB, its external data ``model.onnx.data``.
    """

    path: Path
    bytes: int
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: tuple[Path, ...] = ()


@door
def export(
    model: nn.Module,
    path: PathLike,
    example_inputs: ExampleInputs,
    *,
    dynamic_batch: bool = True,
    dynamic_axes: DynamicAxes | None = None,
    opset: int = 21,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write ``model`` in evaluation mode as an ONNX file.

    Batch norms are merged into the convolutions before them, constants are folded, names and
    annotations shortened; the result is checked and appears at ``path`` only when complete.
    A model from :mod:`slimkit.quantize` becomes a QDQ model with int8 weights. Inputs are named
    by the parameters of ``forward`` and stand in its order, whatever that of a dictionary is.
    Weights beyond 2 GiB, protobuf's limit, go to ``model.onnx.data`` beside the file. Exports in
    several threads wait for each other; networks may run in other threads meanwhile.

    Args:
        model: any module; its training flags are as before afterwards.
        path: the ``.onnx`` file to write.
        example_inputs: one call; its shapes are fixed in the file, but for open dimensions.
        dynamic_batch: let dimension 0 of every directly passed tensor be any number ≥ 1
            (of those that agree with the first one in that dimension).
        dynamic_axes: further dimensions that stay open, as input → {dimension: name}, such as
            ``{"input_ids": {0: "batch", 1: "sequence"}}``; dimensions of one name have one size.
            Or a list of the usual names: ``["height", "width"]``, the last two of (N, C, H, W),
            and ``"sequence"``, dimension 1 of (N, T) and (N, T, C). The finished file is run at
            another size of each and compared with the network.
        opset: 18 to 23; int8 models need 21.
        input_names: one per tensor; default ``input``, or the parameter names of ``forward``.
        output_names: one per tensor; default ``logits`` (one 2-D tensor), the keys of a
            dictionary, or ``output0`` …
        metadata: entries for the file's ``metadata_props``, such as ``preprocessing``.

    Raises:
        InputError: an argument has the wrong type, count or range.
        ExportError: the model fails on the inputs, has an operator without ONNX translation,
            or its forward works for one size only of a dimension that should stay open; names it.
        ArtifactError: ``path`` is not writable.
    """
    _check_arguments(model, path, opset, metadata)
    inputs = in_signature_order(model, _on_device(as_inputs(example_inputs), model))
    with exporting(), evaluation(model), torch.no_grad(), _quiet():
        batched = batched_positions(inputs) if dynamic_batch else []
        if dynamic_batch and not batched:
            raise ExportError(
                "no tensor is passed directly, so there is no batch dimension to leave open",
                where="dynamic_batch",
                hint="use dynamic_batch=False",
            )
        named = named_outputs(_first_run(model, inputs))
        if not named:
            raise ExportError("the model returns no tensor", where=type(model).__name__)
        ins = _checked_names(input_names, default_input_names(model, inputs), "input_names")
        outs = _checked_names(output_names, default_output_names(named), "output_names", taken=ins)
        axes = checked_axes(dynamic_axes, ins, inputs.tensors(), batched)
        flat = set_evaluation(FlatModel(model, inputs))
        proto = _convert(flat, inputs.tensors(), axes, opset, ins, outs)
        hints = getattr(model, "export_hints", None)
        _finish(proto, axes, ins, metadata or {}, {} if hints is None else hints())
        rough = _is_rough(proto, inputs)
        return _write(
            proto,
            Path(path),
            opset,
            lambda file: try_out(file, flat, inputs.tensors(), axes, rough=rough),
        )


def _check_arguments(
    model: object, path: object, opset: int, metadata: Mapping[Any, Any] | None
) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}", where="model")
    if not isinstance(path, (str, os.PathLike)) or Path(path).suffix != ".onnx":
        raise InputError(f"expected a file name ending in .onnx, got {path!r}", where="path")
    if opset not in OPSETS:
        raise InputError(f"opset {opset} is not supported", where="opset", hint="choose 18 to 23")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError(
                f"keys and values are strings, got {key!r}: {type(value).__name__}",
                where="metadata",
                hint="json.dumps the value",
            )


def _on_device(inputs: Inputs, model: nn.Module) -> Inputs:
    parameter = next(model.parameters(), None)
    return inputs if parameter is None else inputs.to(parameter.device)


def _first_run(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return inputs.call(model)
    except Exception as error:
        raise ExportError(
            f"the model fails on the example inputs: {_first_line(error)}",
            where=type(model).__name__,
        ) from error


def _checked_names(
    given: Sequence[str] | None, default: list[str], where: str, taken: Sequence[str] = ()
) -> list[str]:
    if given is None:
        return [f"{name}_out" if name in taken else name for name in default]
    names = list(given)
    if len(names) != len(default):
        raise InputError(
            f"{len(names)} names for {len(default)} tensors", where=where, hint=f"like {default}"
        )
    if len({*names, *taken}) < len(names) + len(taken) or not all(names):
        raise InputError(f"the names are not unique: {[*taken, *names]}", where=where)
    return names


def _convert(
    flat: FlatModel,
    tensors: list[Tensor],
    axes: Axes,
    opset: int,
    ins: list[str],
    outs: list[str],
) -> ModelProto:
    """Trace symbolically and translate to an ONNX graph with constants folded."""
    example, shapes = symbolic(tensors, axes)
    name = type(flat.model).__name__
    try:
        program = torch.export.export(
            flat, example, dynamic_shapes={"tensors": shapes}, strict=False
        )
    except Exception as error:
        raise _capture_error(error, name, ins, axes) from error
    try:
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=ins,
            output_names=outs,
            custom_translation_table=translation_table(),
            verbose=False,
            optimize=True,
        )
    except Exception as error:
        raise _conversion_error(error, name) from error
    if onnx_program is None:
        raise ExportError("the exporter returned nothing", where=name)
    return onnx_program.model_proto


def _capture_error(error: Exception, name: str, ins: list[str], axes: Axes) -> ExportError:
    text = str(error)
    constant = specialized(text, ins, axes)
    if constant is not None:
        return fixed(*constant)
    if axes and re.search(r"[Cc]onstraint|specializ|marked .*dynamic", text):
        labels = sorted({label for entry in axes.values() for label in entry.values()})
        return fixed(" or ".join(labels), name)
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__:
        return ExportError(
            f"its forward decides by the values of tensors: {_first_line(error)}",
            where=name,
            hint="ONNX needs the same operators for every input",
        )
    return ExportError(f"it cannot be traced: {_first_line(error)}", where=name)


def _conversion_error(error: Exception, name: str) -> ExportError:
    cause: BaseException | None = error
    while cause is not None:
        found = re.search(r"OpOverload\(op='([^']+)', overload='([^']+)'\)", str(cause))
        if found and "No ONNX function" in str(cause):
            return ExportError(
                f"the operator {found[1]}.{found[2]} has no ONNX translation",
                where=name,
                hint="add one to slimkit.runtime.export_hooks.TRANSLATIONS",
            )
        last, cause = cause, cause.__cause__
    return ExportError(f"it cannot be written as ONNX: {_first_line(last)}", where=name)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _finish(
    proto: ModelProto,
    axes: Axes,
    ins: list[str],
    metadata: Mapping[str, str],
    hints: Mapping[str, str],
) -> None:
    """Graph passes, tidying, names of the open dimensions, metadata.

    The passes find ``hints``, what the model's ``export_hints()`` returned, among the metadata.
    """
    from onnx import helper

    from slimkit.runtime.onnx_tidy import mean_to_global_pool, tidy

    mean_to_global_pool(proto)
    helper.set_model_props(proto, dict(hints))
    for name in GRAPH_PASSES:
        GRAPH_PASSES.get(name)(proto)
    tidy(proto)
    name_axes(proto, ins, axes)
    proto.producer_name, proto.producer_version = "slimkit", slimkit.__version__
    proto.graph.name = "main"
    helper.set_model_props(proto, {"slimkit_version": slimkit.__version__, **metadata})


def _is_rough(proto: ModelProto, inputs: Inputs) -> bool:
    """Whether rounding is coarse: quantized values, or half precision."""
    halves = (torch.float16, torch.bfloat16)
    return any(node.op_type.endswith("QuantizeLinear") for node in proto.graph.node) or any(
        tensor.dtype in halves for tensor in inputs.tensors()
    )


def _write(
    proto: ModelProto, path: Path, opset: int, try_out: Callable[[Path], None]
) -> ExportResult:
    files = write_onnx(proto, path, check=True, accept=try_out)
    return ExportResult(
        path=path,
        bytes=sum(file.stat().st_size for file in files),
        opset=opset,
        inputs=tuple(_spec(value) for value in proto.graph.input),
        outputs=tuple(_spec(value) for value in proto.graph.output),
        files=files,
    )


def _spec(value: ValueInfoProto) -> TensorSpec:
    from onnx import helper

    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    axes = tuple(d.dim_param or None for d in tensor.shape.dim)
    kind = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return TensorSpec(value.name, shape, kind, axes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of exporter and optimizer; errors still raise."""
    loggers = [logging.getLogger(name) for name in _CHATTER]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
