"""From a PyTorch network to one small, checked ONNX file."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import slimkit
from slimkit.artifact import PathLike, atomic_file
from slimkit.errors import ExportError, InputError
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.modules import evaluation, set_evaluation
from slimkit.runtime.export_hooks import GRAPH_PASSES, translation_table
from slimkit.runtime.sessions import TensorSpec
from slimkit.runtime.structure import (
    FlatModel,
    batched_positions,
    default_input_names,
    default_output_names,
    named_outputs,
)

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

__all__ = ["OPSETS", "ExportResult", "export"]

OPSETS = range(18, 24)
"""Opset versions that the exporter writes and ONNX Runtime reads."""
_LIMIT = 2**31 - 1  # bytes of one protobuf message
_CHATTER = ("torch.onnx", "torch.export", "torch._export", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        opset: ONNX operator set version.
        inputs: name, shape (None = any batch) and dtype of every input.
        outputs: the same for the outputs, in the order of the model's own.
    """

    path: Path
    bytes: int
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def export(
    model: nn.Module,
    path: PathLike,
    example_inputs: ExampleInputs,
    *,
    dynamic_batch: bool = True,
    opset: int = 21,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write ``model`` in evaluation mode as one self-contained ONNX file.

    Batch norms are merged into the convolutions before them, constants are folded, names and
    annotations shortened; the result is checked and appears at ``path`` only when complete.
    A model from :mod:`slimkit.quantize` becomes a QDQ model with int8 weights.

    Args:
        model: any module; its training flags are as before afterwards.
        path: the ``.onnx`` file to write.
        example_inputs: one call; its shapes are fixed in the file, but for the batch.
        dynamic_batch: let dimension 0 of every directly passed tensor be any number ≥ 1
            (of those that agree with the first one in that dimension).
        opset: 18 to 23; int8 models need 21.
        input_names: one per tensor; default ``input``, or the parameter names of ``forward``.
        output_names: one per tensor; default ``logits`` (one 2-D tensor), the keys of a
            dictionary, or ``output0`` …
        metadata: entries for the file's ``metadata_props``, such as ``preprocessing``.

    Raises:
        InputError: an argument has the wrong type, count or range.
        ExportError: the model fails on the inputs, has an operator without ONNX translation,
            or its forward works for one batch size only.
        ArtifactError: ``path`` is not writable.
    """
    _check_arguments(model, path, opset, metadata)
    inputs = _on_device(as_inputs(example_inputs), model)
    with evaluation(model), torch.no_grad(), _quiet():
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
        proto = _convert(FlatModel(model, inputs), inputs.tensors(), batched, opset, ins, outs)
    hints = getattr(model, "export_hints", None)
    _finish(proto, batched, ins, metadata or {}, {} if hints is None else hints())
    return _write(proto, Path(path), opset)


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
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size >= _LIMIT:
        raise ExportError(
            f"the weights take {size / 2**30:.1f} GiB; one ONNX file holds less than 2 GiB",
            where=type(model).__name__,
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
    batched: list[int],
    opset: int,
    ins: list[str],
    outs: list[str],
) -> ModelProto:
    """Trace symbolically and translate to an ONNX graph with constants folded."""
    set_evaluation(flat)
    for index in batched:
        if tensors[index].shape[0] == 1:  # a batch of one would be taken for a constant
            tensors[index] = torch.cat([tensors[index]] * 2)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple({0: dynamic} if i in batched else None for i in range(len(tensors)))
    name = type(flat.model).__name__
    try:
        program = torch.export.export(
            flat, tuple(tensors), dynamic_shapes={"tensors": shapes}, strict=False
        )
    except Exception as error:
        raise _capture_error(error, name, dynamic_batch=bool(batched)) from error
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


def _capture_error(error: Exception, name: str, *, dynamic_batch: bool) -> ExportError:
    text = str(error)
    if dynamic_batch and re.search(r"[Cc]onstraint|specializ|marked .*dynamic", text):
        return ExportError(
            "its forward works for one batch size only: it turns the batch into a fixed number",
            where=name,
            hint="use dynamic_batch=False, or -1 and tensor.shape[0] in place of the number",
        )
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
    batched: list[int],
    ins: list[str],
    metadata: Mapping[str, str],
    hints: Mapping[str, str],
) -> None:
    """Graph passes, tidying, name of the batch dimension, metadata, check.

    The passes find ``hints``, what the model's ``export_hints()`` returned, among the metadata.
    """
    import onnx
    from onnx import helper

    from slimkit.runtime.onnx_tidy import mean_to_global_pool, tidy

    mean_to_global_pool(proto)
    helper.set_model_props(proto, dict(hints))
    for name in GRAPH_PASSES:
        GRAPH_PASSES.get(name)(proto)
    tidy(proto)
    _name_batch(proto, [ins[index] for index in batched])
    proto.producer_name, proto.producer_version = "slimkit", slimkit.__version__
    proto.graph.name = "main"
    helper.set_model_props(proto, {"slimkit_version": slimkit.__version__, **metadata})
    if proto.ByteSize() >= _LIMIT:
        raise ExportError("the graph takes 2 GiB or more; one ONNX file holds less")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid: {_first_line(error)}") from error


def _name_batch(proto: ModelProto, batched: list[str]) -> None:
    """Call the symbol of the batch ``batch`` everywhere."""
    graph = proto.graph
    symbols = set()
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in batched:
            if not dims or not dims[0].dim_param:
                raise ExportError(
                    "the batch dimension became a constant",
                    where=value.name,
                    hint="use dynamic_batch=False",
                )
            symbols.add(dims[0].dim_param)
    for value in [*graph.input, *graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = "batch"


def _write(proto: ModelProto, path: Path, opset: int) -> ExportResult:
    data = proto.SerializeToString(deterministic=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return ExportResult(
        path=path,
        bytes=len(data),
        opset=opset,
        inputs=tuple(_spec(value) for value in proto.graph.input),
        outputs=tuple(_spec(value) for value in proto.graph.output),
    )


def _spec(value: ValueInfoProto) -> TensorSpec:
    from onnx import helper

    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return TensorSpec(value.name, shape, str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)))


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
