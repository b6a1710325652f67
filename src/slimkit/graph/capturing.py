"""Capture: run a model once and keep what it did.

One eager forward in evaluation mode, without gradients, under two modes: a
:class:`~slimkit.graph.addressing.AddressMode` that sees the Python-level calls
(``F.conv2d``, ``x + y``) and a dispatch mode that sees the operators below
(``aten.convolution``). Whatever the Python control flow does, the two lists hold what
happened, in order, connected by value numbers. No tensor data is kept, so convolutions and
matrix products, which take most of the time, hand out zeros (:mod:`slimkit.graph.shortcuts`);
where something that happens depends on values, the forward begins again and computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from slimkit.doors import door
from slimkit.errors import CaptureError
from slimkit.graph.captured import Call, Graph, Op, Ref, TensorInfo, tensors_in
from slimkit.graph.isolation import (
    KeptParameters,
    own_inputs,
    training_flags,
    uncollected,
    undisturbed,
)
from slimkit.graph.recording import GraphRecorder, ValueNumbering
from slimkit.graph.shortcuts import ValuesNeededError
from slimkit.graph.sight import Sight
from slimkit.inputs import ExampleInputs
from slimkit.locking import one_at_a_time

__all__ = [
    "BothModes",
    "Call",
    "Graph",
    "Op",
    "Ref",
    "TensorInfo",
    "capture",
    "capture_both_modes",
    "tensors_in",
]


@door
@one_at_a_time()
@uncollected()
def capture(model: nn.Module, example_inputs: ExampleInputs) -> Graph:
    """Run ``model`` once and record its operators, calls and tensors.

    The forward runs in evaluation mode and without gradients, on the device of the first
    parameter. Training flags and buffers are afterwards as before, and the random state of the
    process is not touched. Hooks of the model see zeros behind convolutions and linear layers.
    Captures in several threads wait for each other, and for exports.

    Args:
        model: any module.
        example_inputs: what it is called with; see :class:`~slimkit.inputs.Inputs`.

    Raises:
        CaptureError: the forward failed; names the innermost module that was running.
        InputError: ``example_inputs`` is of no accepted kind.
    """
    try:
        return _captured(model, example_inputs, values=False)
    except (ValuesNeededError, CaptureError):  # zeros may be what it failed on
        return _captured(model, example_inputs, values=True)


def _captured(model: nn.Module, example_inputs: ExampleInputs, *, values: bool) -> Graph:
    inputs = own_inputs(model, example_inputs)
    recorder = GraphRecorder(model, values)
    with undisturbed(model), torch.no_grad():
        recorder.record(model, inputs)
    return recorder.graph


@dataclass(frozen=True, eq=False)
class BothModes:
    """What a model does in evaluation mode, and what it does in training mode beside that.

    Attributes:
        evaluation: the evaluation forward.
        both: its operators, and behind them those that only training mode ran; the same graph
            as ``evaluation`` where there are none.
        failure: how the training forward failed; ``""`` if it did not. What ran before is in
            ``both`` all the same.
        sight: path of every module that ran → value numbers (of ``both``) that its ``forward``
            had in hand; see :class:`~slimkit.graph.sight.Sight`.
    """

    evaluation: Graph
    both: Graph
    failure: str
    sight: Mapping[str, Mapping[int, None]]


@door
@one_at_a_time()
@uncollected()
def capture_both_modes(model: nn.Module, example_inputs: ExampleInputs) -> BothModes:
    """Capture the evaluation forward, and one in training mode.

    Operators of the training forward that the evaluation forward ran on the same values are
    recognised (value numbering) and not recorded again, so that what both modes share exists
    once. Layers of torch, batch normalization and dropout are left in evaluation mode; see
    :func:`~slimkit.graph.isolation.training_flags`. Everything is restored as by
    :func:`capture`; a training forward that fails is no error.

    Raises:
        CaptureError: the evaluation forward failed.
        InputError: ``example_inputs`` is of no accepted kind.
    """
    try:
        recorder, evaluation = _evaluated(model, example_inputs, values=False)
    except (ValuesNeededError, CaptureError):
        recorder, evaluation = _evaluated(model, example_inputs, values=True)
    recorder.graph = evaluation.copy()
    failure = ""
    try:
        _train_too(recorder, model, example_inputs)
    except (ValuesNeededError, CaptureError) as error:
        failure = str(error)
        if not recorder.computes:
            recorder.computes = True
            try:
                _train_too(recorder, model, example_inputs)
                failure = ""
            except CaptureError as again:
                failure = str(again)
    both = recorder.graph
    more = len(both.ops) > len(evaluation.ops) or set(both.outputs) != set(evaluation.outputs)
    sight = recorder.sight.seen if recorder.sight is not None else {}
    return BothModes(evaluation, both if more else evaluation, failure, sight)


def _evaluated(
    model: nn.Module, example_inputs: ExampleInputs, *, values: bool
) -> tuple[GraphRecorder, Graph]:
    recorder = GraphRecorder(model, values)
    recorder.numbering = ValueNumbering()
    recorder.sight = Sight(model, recorder.values)
    inputs = own_inputs(model, example_inputs)
    with undisturbed(model), torch.no_grad(), recorder.sight:
        recorder.record(model, inputs)
    return recorder, recorder.graph


def _train_too(recorder: GraphRecorder, model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Add what a training forward does to the graph of ``recorder``."""
    inputs = own_inputs(model, example_inputs)
    assert recorder.numbering is not None
    assert recorder.sight is not None
    recorder.numbering.begin_again()
    recorder.kept = KeptParameters(model)
    try:
        with undisturbed(model), training_flags(model), torch.no_grad(), recorder.sight:
            recorder.record(model, inputs)
    finally:
        recorder.kept.restore()
        recorder.kept = None
