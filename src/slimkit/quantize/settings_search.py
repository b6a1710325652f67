"""Which settings of post-training quantization suit a network: a search over all of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from slimkit.artifact import PathLike, content_hash, tensors_hash
from slimkit.doors import door
from slimkit.errors import DataError, InputError, nearest
from slimkit.graph.patterns import Pattern
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.limits import MOST_DB, Limit
from slimkit.measure.tables import rendered
from slimkit.modules import Evaluate, evaluation
from slimkit.quantize.batches import Batches
from slimkit.quantize.calibration import WeightBits, ptq
from slimkit.quantize.evaluating import evaluated, refuse_test_data
from slimkit.quantize.methods.interface import METHODS
from slimkit.quantize.observers.ranges import OBSERVERS
from slimkit.quantize.outputs.distance import OutputDistance, decibels
from slimkit.quantize.targets import Target, resolve_target
from slimkit.search import Candidate, Choice, IntRange, Parameter, SearchResult, search
from slimkit.search.parameters import Parameters, SearchSpace
from slimkit.search.samplers import Sampler

__all__ = ["SettingsSearch", "arguments_of", "search_settings", "settings_space"]

OutputMeasure = Literal["sqnr", "kl"]
_SEARCHABLE = ("observer", "granularity", "batches", "weight_bits", "methods")


@dataclass(frozen=True)
class SettingsSearch:
    """What a search over settings found. Print it for a table, best first.

    Attributes:
        result: every trial.
        objective: ``"sqnr"`` (dB), ``"kl"`` (nats) or ``"metric"``.
    """

    result: SearchResult
    objective: str

    @property
    def settings(self) -> dict[str, Any]:
        """Of the best trial, as keyword arguments of :func:`~slimkit.quantize.ptq`."""
        return arguments_of(self.result.best.parameters)

    @property
    def value(self) -> float:
        """The objective of the best trial."""
        return float(self.result.best.value or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the best parameters by their names in the space."""
        best = dict(self.result.best.parameters)
        return {"objective": self.objective, "best": best, **self.result.to_json()}

    def __str__(self) -> str:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        names = list(self.result.best.parameters)
        table.add_column("trial", justify="right")
        table.add_column({"sqnr": "SQNR, dB", "kl": "KL, nats"}.get(self.objective, "metric"))
        for name in names:
            table.add_column(name)
        for trial in sorted(self.result.finished, key=lambda trial: -(trial.score or 0.0)):
            values = [_word(trial.parameters[name]) for name in names]
            table.add_row(str(trial.number), f"{trial.value:.5g}", *values)
        return rendered(table, width=200)


@door
def search_settings(  # noqa: PLR0913 - the verb: every choice is a keyword with a default
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any],
    evaluate: Evaluate | None = None,
    objective: OutputMeasure = "sqnr",
    space: Mapping[str, Parameter] | None = None,
    trials: int = 20,
    sampler: str | Sampler = "tpe",
    target: str | Target = "onnxruntime",
    skip: Pattern | Iterable[Pattern] = (),
    weight_bits: WeightBits | None = None,
    max_float: float | None = None,
    storage: PathLike | None = None,
    seed: int = 0,
    progress: bool = False,
) -> SettingsSearch:
    """Look for the settings of :func:`~slimkit.quantize.ptq` that lose least.

    Without ``evaluate`` no labels are needed: the last quarter of the calibration batches is
    held out, and the outputs of float and quantized network are compared on it.

    Args:
        model: any module; it is copied, not changed.
        example_inputs: one call; see :class:`slimkit.Inputs`.
        calibration: batches of training data, as for :func:`~slimkit.quantize.ptq`; held in
            memory.
        evaluate: network → metric on validation data, higher is better.
        objective: without ``evaluate``: ``"sqnr"``, the signal to quantization noise of the
            outputs, or ``"kl"``, the divergence of the classes' probabilities.
        space: name → range or choice; by default :func:`settings_space`. Names are arguments of
            :func:`~slimkit.quantize.ptq` (``observer``, ``granularity``, ``batches``,
            ``weight_bits``); ``methods.NAME`` (True or False) for a method, in the order of the
            space; ``observer.SETTING`` and ``methods.NAME.SETTING`` for settings of theirs.
        trials: networks to quantize; the first has the defaults of
            :func:`~slimkit.quantize.ptq`, where the space holds them.
        sampler: as for :func:`slimkit.search.search`.
        target: the runtime whose integer operators the scheme must fit.
        skip: modules that stay in float.
        weight_bits: bits of weights, where the space does not name them.
        max_float: share of the multiply-adds that every trial may leave in float, in the layers
            where that helps it most; see :func:`~slimkit.quantize.ptq`.
        storage: a journal that trials are added to and that a killed search goes on from.
        seed: of proposals, and of everything random in methods.
        progress: show progress on standard error.

    Returns:
        All trials; ``ptq(..., **found.settings)`` uses the best.

    Raises:
        InputError: an argument is wrong, or ``storage`` belongs to another search.
        DataError: fewer than two batches, or test data.
        SearchError: too many evaluations failed; its ``result`` holds the trials so far.
        ArtifactError: ``storage`` cannot be read or written.
    """
    if objective not in get_args(OutputMeasure):
        raise InputError(
            f"unknown objective {objective!r}",
            where="objective",
            hint=nearest(str(objective), get_args(OutputMeasure)),
        )
    if evaluate is not None:
        refuse_test_data(evaluate)
    resolved = resolve_target(target)
    limit = None if max_float is None else Limit(max_float=max_float)
    data, held_out = _divided(calibration, as_inputs(example_inputs), alone=evaluate is not None)
    known = settings_space(len(data)) if space is None else dict(space)
    _check_names(known)
    score = _Score(model, evaluate, objective, held_out)

    def run(parameters: Parameters, _candidate: Candidate) -> dict[str, float]:
        arguments = {"weight_bits": weight_bits, **arguments_of(parameters)}
        with warnings.catch_warnings():  # a bad trial is no news
            warnings.simplefilter("ignore", UserWarning)
            quantized = ptq(
                model,
                example_inputs,
                calibration=data,
                target=resolved,
                skip=skip,
                limit=limit,
                progress=False,
                **arguments,
            )
        return score(quantized)

    result = search(
        known,
        run,
        trials=trials,
        sampler=sampler,
        objective=score.name,
        direction="minimize" if score.name == "kl" else "maximize",
        start=_defaults(known),
        storage=storage,
        identity=_identity(model, [*data, *held_out], resolved, (skip, weight_bits, max_float)),
        seed=seed,
        progress=progress,
        label="settings",
    )
    return SettingsSearch(result, score.name)


def settings_space(batches: int) -> dict[str, Parameter]:
    """Every registered observer and method, both granularities, and how many batches.

    Args:
        batches: there are for calibration.
    """
    space: dict[str, Parameter] = {
        "observer": Choice(*OBSERVERS.names()),
        "granularity": Choice("channel", "tensor"),
    }
    if batches > 1:
        space["batches"] = IntRange(1, batches)
    return {**space, **{f"methods.{name}": Choice(False, True) for name in METHODS.names()}}


def arguments_of(parameters: Parameters) -> dict[str, Any]:
    """A point of the space as keyword arguments of :func:`~slimkit.quantize.ptq`."""
    arguments: dict[str, Any] = {k: v for k, v in parameters.items() if "." not in k}
    own = _below(parameters, "observer")
    if own:
        name = str(arguments.get("observer", "minmax"))
        arguments["observer"] = _built(OBSERVERS.get(name, where="observer"), own) or name
    methods: list[Any] = []
    for key, chosen in parameters.items():
        if key.startswith("methods.") and key.count(".") == 1 and chosen:
            name = key.partition(".")[2]
            method = METHODS.get(name, where=key)
            methods.append(_built(method, _below(parameters, key)) or name)
    searched = any(key.startswith("methods.") for key in parameters)
    return {**arguments, "methods": methods} if searched else arguments


def _below(parameters: Parameters, key: str) -> dict[str, Any]:
    return {k.removeprefix(f"{key}."): v for k, v in parameters.items() if k.startswith(f"{key}.")}


def _built(kind: Any, settings: Mapping[str, Any]) -> Any:
    """An instance with those settings that it has; None if it has none of them."""
    taken = set(inspect.signature(kind).parameters)
    own = {name: value for name, value in settings.items() if name in taken}
    return kind(**own) if own else None


class _Score:
    """Metrics of one quantized network."""

    def __init__(
        self,
        model: nn.Module,
        evaluate: Evaluate | None,
        objective: str,
        held_out: list[Inputs],
    ) -> None:
        self.name = objective if evaluate is None else "metric"
        self._evaluate = evaluate
        self._distance: OutputDistance | None = None
        if evaluate is None:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            with evaluation(model):
                self._distance = OutputDistance(model, [b.to(device) for b in held_out])

    def __call__(self, quantized: nn.Module) -> dict[str, float]:
        if self._distance is None:
            assert self._evaluate is not None
            return {"metric": evaluated(self._evaluate, quantized, "the quantized network")}
        found = {"sqnr": min(MOST_DB, decibels(self._distance.noise(quantized)))}
        if self.name == "kl":
            found["kl"] = self._distance.divergence(quantized)
        return found


def _divided(
    calibration: Iterable[Any], example: Inputs, *, alone: bool
) -> tuple[list[Inputs], list[Inputs]]:
    """Batches to calibrate on, and the last quarter to compare outputs on."""
    data = list(Batches(calibration, example))
    if alone:
        return data, []
    if len(data) < 2:
        raise DataError(
            "one batch cannot be divided into calibration and comparison",
            where="calibration",
            hint="give two or more batches, or evaluate=",
        )
    held = max(1, len(data) // 4)
    return data[:-held], data[-held:]


def _check_names(space: SearchSpace) -> None:
    for name in space:
        first, *rest = name.split(".")
        fits = first in _SEARCHABLE and bool(rest) == (first == "methods")
        if not fits and not (first == "observer" and len(rest) == 1):
            raise InputError(
                f"{name!r} is no setting to search",
                where="space",
                hint=nearest(name, [*_SEARCHABLE[:-1], *(f"methods.{m}" for m in METHODS)]),
            )


def _defaults(space: SearchSpace) -> list[dict[str, Any]]:
    """The defaults of ptq as a point of the space; nothing if they are not in it."""
    plain = {"observer": "minmax", "granularity": "channel", "weight_bits": 8}
    point: dict[str, Any] = {}
    for name, parameter in space.items():
        value: Any = plain.get(name)
        if name == "batches":
            value = getattr(parameter, "high", None)
        elif name.startswith("methods.") and name.count(".") == 1:
            value = False
        try:
            point[name] = parameter.checked(value)
        except (TypeError, ValueError):
            return []
    return [point]


def _identity(
    model: nn.Module,
    data: list[Inputs],
    target: Target,
    others: Iterable[object],
) -> dict[str, Any]:
    """What a journal belongs to."""
    images = {
        f"{number}.{place}": tensor
        for number, batch in enumerate(data)
        for place, tensor in enumerate(batch.tensors())
    }
    weights = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    return {
        "target": target.name,
        "sums": target.sums,
        "weights": tensors_hash(weights)[:16],
        "calibration": tensors_hash(images)[:16],
        "others": content_hash([str(other) for other in others])[:16],
    }


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
