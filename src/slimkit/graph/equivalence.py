"""Proof of a pruning plan: the pruned network and the masked original must agree.

The original runs with its doomed channels set to zero in front of every operator that adds
up over channels (convolutions, matrix products, sums, norms), and with the statistics of
norms, means and the like over the channels that stay. Whatever the weights are, that is what
the pruned network computes, so outputs agree to rounding or the plan is wrong. No
training, no data, any network. Where the network decides something on the way (which boxes
survive), both numbers are compared and the original's decision is taken over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import CaptureError
from slimkit.graph.capturing import Graph, capture_both_modes, tensors_in
from slimkit.graph.decisions import Decisions, largest_difference
from slimkit.graph.isolation import own_inputs, undisturbed
from slimkit.graph.masking import PruningPlan, masked_outputs
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.modules import copy_module

__all__ = ["Equivalence", "check_equivalence"]


@dataclass(frozen=True)
class Equivalence:
    """What :func:`check_equivalence` found.

    Attributes:
        max_abs_diff: largest difference of any output element.
        max_abs_output: largest output element, to judge the difference by.
        tolerance: the difference allowed, as a fraction of ``max_abs_output``.
        masked_norms: paths of the modules whose statistics (norms, means, attention scales)
            leave out channels that go, so that the pruned network is *not* the original with
            zeroed channels.
        decisions: comparisons, sorts, non-maximum suppressions and the like whose outcome was
            taken over from the original, so that rounding cannot flip one.
        max_decision_diff: largest difference of a number that was decided on, as a fraction
            of the largest one beside it.
    """

    max_abs_diff: float
    max_abs_output: float
    tolerance: float
    masked_norms: tuple[str, ...]
    decisions: int = 0
    max_decision_diff: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether outputs and decisions agree; false if they are not finite."""
        return (
            self.max_abs_diff <= self.tolerance * self.max_abs_output
            and self.max_decision_diff <= self.tolerance
        )

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "DIFFERENT"
        text = f"{verdict}: outputs up to {self.max_abs_output:.3g} differ by "
        text += f"{self.max_abs_diff:.3g} at most"
        if self.decisions:
            text += f", the numbers behind {self.decisions} decisions by "
            text += f"{self.max_decision_diff:.1e} of their size"
        if self.masked_norms:
            text += "; statistics over the channels that stay in " + ", ".join(self.masked_norms)
        return text


@door
def check_equivalence(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    *,
    tolerance: float = 1e-8,
    double: bool = True,
) -> Equivalence:
    """Compare the masked original with the pruned network. ``model`` is not changed.

    Args:
        model: the network before pruning.
        plan: the plan, with ``edits`` and ``apply_to``.
        example_inputs: what both are run on.
        tolerance: allowed difference as a fraction of the largest output element.
        double: run copies in float64, where rounding cannot hide or feign a mistake. With
            ``False``, and for a model whose code insists on another type, in its own precision
            and with a tolerance of at least 1e-4.

    Raises:
        PlanError: the plan does not fit the model, or splits channels that belong together.
        CaptureError: a forward failed.
    """
    original, inputs, graph, double = _captured_copy(model, as_inputs(example_inputs), double)
    decisions = Decisions(graph.table)
    tolerance = tolerance if double else max(tolerance, 1e-4)
    masked, norms = masked_outputs(original, inputs, graph, plan, decisions)
    pruned = plan.apply_to(original)
    replay = decisions.replay(pruned)
    with undisturbed(pruned, seed=0), torch.no_grad():
        try:
            with replay:
                found = list(tensors_in(own_inputs(pruned, inputs).run(pruned)))
        except Exception as error:
            raise CaptureError(
                f"the pruned network fails with {type(error).__name__}: {error}",
                where=type(model).__name__,
            ) from error
    expected = list(tensors_in(masked))
    pairs = zip(found, expected, strict=False)
    worst = max((largest_difference(*pair) for pair in pairs), default=0.0)
    return Equivalence(
        max_abs_diff=worst if len(found) == len(expected) else float("inf"),
        max_abs_output=max((_largest(t) for t in expected), default=0.0),
        tolerance=tolerance,
        masked_norms=norms,
        decisions=replay.count,
        max_decision_diff=replay.worst,
    )


def _captured_copy(
    model: nn.Module, inputs: Inputs, double: bool
) -> tuple[nn.Module, Inputs, Graph, bool]:
    """A copy of the model, its inputs and its capture, in float64 where that runs."""
    if double:
        original = copy_module(model).double()
        precise = inputs.map(lambda t: t.double() if t.is_floating_point() else t)
        try:
            return original, precise, capture_both_modes(original, precise).both, True
        except CaptureError:  # raised again below unless its own precision is what it needs
            pass
    original = copy_module(model)
    return original, inputs, capture_both_modes(original, inputs).both, False


def _largest(tensor: Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)] if tensor.is_floating_point() else tensor
    return float(finite.double().abs().max()) if finite.numel() else 0.0
