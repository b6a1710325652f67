"""The public verbs of the API, each with a call that works and a judge of what it returns."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimkit as sk
from benchmarks.fuzz.odd import image_batches, images, network
from slimkit import graph, runtime
from slimkit.measure.latency import benchmark_interleaved
from slimkit.models import example_input, list_models, load_checkpoint
from slimkit.models.building import build_model
from slimkit.tasks import SampleLoader
from slimkit.tasks.data import ArrayLoader, AugmentSettings, DataSettings, load_data, synthetic_data

__all__ = ["FOLDER", "VERBS", "Verb"]

FOLDER = tempfile.TemporaryDirectory(prefix="slimkit-fuzz-")
"""Where everything is written; gone when the process ends."""


@dataclass(frozen=True)
class Verb:
    """One public function or class.

    Attributes:
        name: as people write it.
        call: what is called.
        arguments: those of a call that works, made anew; ``self`` of a method is none of them.
        fits: whether what it returned is right, given the arguments.
        changes: whether it may change the network that it is given.
        share: how often it is chosen, against the others.
    """

    name: str
    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    fits: Callable[[Any, Mapping[str, Any]], bool] = lambda _result, _given: True
    changes: bool = False
    share: float = 1.0


@functools.cache
def _onnx() -> str:
    path = f"{FOLDER.name}/net.onnx"
    sk.export(network(), path, images())
    return path


@functools.cache
def _saved() -> str:
    path = f"{FOLDER.name}/saved"
    sk.save(network(), path)
    return path


@functools.cache
def _weights() -> str:
    path = f"{FOLDER.name}/weights.pt"
    torch.save(network().state_dict(), path)
    return path


@functools.cache
def _plan() -> sk.Plan:
    return sk.prune.plan(network(), images(), ratio=0.5)


@functools.cache
def _plan_file() -> str:
    path = f"{FOLDER.name}/plan.json"
    _plan().save(path)
    return path


@functools.cache
def _captured() -> tuple[nn.Module, graph.Graph]:
    model = network()
    return model, graph.capture(model, images())


def _space(**more: Any) -> Any:
    return sk.prune.space(network(), images(), evaluate=lambda _: 1.0, **more)


def _loss(outputs: Any, targets: Any) -> Any:
    return nn.functional.cross_entropy(outputs, targets)


def _on_network(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"model": network(), "example_inputs": images(), **_fresh(more)}


def _fresh(more: Mapping[str, Any]) -> dict[str, Any]:
    return {name: image_batches() if value is BATCHES else value for name, value in more.items()}


BATCHES = object()
"""Stands for labelled batches, made anew."""


def _runs(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether a network that came back runs on what it was made for."""
    if not isinstance(model, nn.Module):
        return False
    graph.as_inputs(given["example_inputs"]).call(model)
    return True


def _same_answers(model: Any, given: Mapping[str, Any]) -> bool:
    inputs = given.get("example_inputs")
    inputs = graph.as_inputs(images() if inputs is None else inputs)
    with torch.no_grad():
        try:
            theirs = inputs.call(given["model"].eval())
        except Exception:  # it does not run on them either
            return True
        ours = inputs.call(model.eval())
    if not isinstance(ours, torch.Tensor) or ours.is_nested:
        return True
    tolerance = 1e-2 if ours.dtype is torch.float16 else 1e-4
    return torch.allclose(ours, theirs, atol=tolerance, equal_nan=True)


def _counts(profile: Any, given: Mapping[str, Any]) -> bool:
    expected = sum(parameter.numel() for parameter in given["model"].parameters())
    quantized = isinstance(given["model"], sk.quantize.QuantizedModel)
    return bool(quantized or profile.params == expected)


def _applies(plan: Any, given: Mapping[str, Any]) -> bool:
    plan.explain()
    try:
        pruned = copy.deepcopy(given["model"])
    except Exception:
        return True
    sk.apply(pruned, plan)
    return _runs(pruned, given)


def _timed(timing: Any, _given: Mapping[str, Any]) -> bool:
    return math.isfinite(timing.median_ms) and timing.median_ms > 0


def _file_there(result: Any, given: Mapping[str, Any]) -> bool:
    return Path(result.path).is_file() and Path(result.path) == Path(given["path"])


def _folder_there(_result: Any, given: Mapping[str, Any]) -> bool:
    return (Path(given["directory"]) / "plans.json").is_file()


def _network_loaded(result: Any, _given: Mapping[str, Any]) -> bool:
    ours, saved = result.state_dict(), network().state_dict()
    return all(bool((ours[name] == saved[name].to(ours[name].dtype)).all()) for name in saved)


def _explained(result: Any, given: Mapping[str, Any]) -> bool:
    result.plan.explain()
    return _runs(result, given)


def _one(name: str, call: Callable[..., Any], /, **given: Any) -> Verb:
    return Verb(name, call, lambda: _fresh(given), share=0.25)


def _settings() -> sk.train.TrainSettings:
    return sk.train.TrainSettings(epochs=1, lr=0.01)


def _fit_arguments() -> dict[str, Any]:
    given = {"model": network(), "loader": image_batches(), "loss_fn": _loss}
    return {**given, "settings": _settings(), "max_steps": 2, "progress": False}


def _on_file(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"path": _onnx(), **_fresh(more)}


def _in_search() -> dict[str, Any]:
    space = {"a": sk.search.IntRange(1, 9), "b": sk.search.Choice("x", "y")}
    given = {"space": space, "evaluate": lambda parameters, _: parameters["a"]}
    return {**given, "trials": 4, "sampler": "random", "progress": False}


_MAKERS: tuple[Verb, ...] = (
    _one("prune.Magnitude", sk.prune.Magnitude),
    _one("prune.FPGM", sk.prune.FPGM),
    _one("prune.Random", sk.prune.Random),
    _one("prune.Normalised", sk.prune.Normalised, criterion="l2"),
    _one("prune.GivenRatios", sk.prune.GivenRatios, ratios={"first.0": 0.5}),
    _one("prune.GlobalRanking", sk.prune.GlobalRanking),
    _one("prune.RemovalTarget", sk.prune.RemovalTarget, kind="macs", fraction=0.5),
    _one("prune.Sensitivity", sk.prune.Sensitivity),
    _one("prune.Annealing", sk.prune.Annealing),
    _one("prune.Genetic", sk.prune.Genetic),
    _one("prune.Taylor", sk.prune.Taylor, batches=BATCHES, loss=_loss),
    _one("prune.GroupFisher", sk.prune.GroupFisher, batches=BATCHES, loss=_loss),
    _one("quantize.Percentile", sk.quantize.Percentile),
    _one("quantize.MSE", sk.quantize.MSE),
    _one("quantize.KL", sk.quantize.KL),
    _one("quantize.MovingAverage", sk.quantize.MovingAverage),
    _one("quantize.PerGroup", sk.quantize.PerGroup),
    _one("quantize.Limit", sk.quantize.Limit, min_sqnr=20.0),
    _one("quantize.NumberFormat", sk.quantize.NumberFormat),
    _one("distill.KD", sk.distill.KD),
    _one("distill.DKD", sk.distill.DKD),
    _one("distill.Mimic", sk.distill.Mimic, student="first"),
    _one("distill.WeightSchedule", sk.distill.WeightSchedule),
    _one("distill.Record", sk.distill.Record, path="first"),
    _one("distill.DAFL", sk.distill.DAFL),
    _one("distill.parse_losses", sk.distill.parse_losses, entries=[{"type": "kd"}]),
    _one("train.TrainSettings", sk.train.TrainSettings),
    _one("search.IntRange", sk.search.IntRange, low=1, high=9),
    _one("search.FloatRange", sk.search.FloatRange, low=0.1, high=0.9),
    _one("search.GeneticSampler", sk.search.GeneticSampler),
    _one("search.TPESampler", sk.search.TPESampler),
    _one("search.AnnealingSampler", sk.search.AnnealingSampler),
    _one("Inputs", sk.Inputs, args=(1,)),
    _one("tasks.DataSettings", DataSettings),
    _one("tasks.AugmentSettings", AugmentSettings),
    _one("tasks.load_data", load_data, settings=DataSettings()),
    _one("tasks.synthetic_data", synthetic_data, settings=DataSettings(), classes=3),
    _one(
        "tasks.ArrayLoader",
        ArrayLoader,
        images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        labels=torch.arange(4),
        batch_size=2,
        role="train",
    ),
    _one(
        "tasks.SampleLoader", SampleLoader, samples=[1, 2], collate=list, batch_size=1, role="train"
    ),
    _one("list_models", list_models),
    _one("build_model", build_model, name="slimkit:resnet20"),
    _one("graph.as_inputs", graph.as_inputs, example_inputs=torch.zeros(1)),
)

VERBS: tuple[Verb, ...] = (
    *_MAKERS,
    Verb("profile", sk.profile, _on_network(), _counts, share=2),
    Verb("graph.capture", graph.capture, _on_network()),
    Verb("prune.plan", sk.prune.plan, _on_network(ratio=0.5, progress=False), _applies, share=3),
    Verb("prune.space", sk.prune.space, _on_network()),
    Verb(
        "prune.iterate",
        sk.prune.iterate,
        _on_network(ratio=0.5, steps=2, train=lambda *_: None, progress=False),
        changes=True,
    ),
    Verb(
        "prune.one_by_one",
        sk.prune.one_by_one,
        _on_network(batches=BATCHES, loss=_loss, params=0.1, every=1),
        changes=True,
    ),
    Verb(
        "prune.measure_sensitivity",
        sk.prune.measure_sensitivity,
        lambda: {"space": _space(), "ratios": (0.5,), "progress": False},
    ),
    Verb(
        "prune.evolve",
        sk.prune.evolve,
        lambda: {
            "space": _space(),
            "target": sk.prune.RemovalTarget("macs", 0.3),
            "trials": 3,
            "progress": False,
        },
    ),
    Verb("prune.merge_sensitivities", sk.prune.merge_sensitivities, lambda: {"parts": []}),
    Verb("prune.BatchNormL1", sk.prune.BatchNormL1, _on_network()),
    Verb("prune.GroupLasso", sk.prune.GroupLasso, _on_network()),
    Verb(
        "quantize.ptq",
        sk.quantize.ptq,
        _on_network(calibration=BATCHES, progress=False),
        _explained,
        share=3,
    ),
    Verb("quantize.qat", sk.quantize.qat, _on_network(calibration=BATCHES), _explained, share=2),
    Verb(
        "quantize.sensitivity",
        sk.quantize.sensitivity,
        _on_network(calibration=BATCHES, progress=False),
    ),
    Verb(
        "quantize.mixed_precision",
        sk.quantize.mixed_precision,
        _on_network(calibration=BATCHES, size=0.6, progress=False),
        share=0.5,
    ),
    Verb(
        "quantize.search_settings",
        sk.quantize.search_settings,
        _on_network(calibration=BATCHES, trials=1),
        share=0.2,
    ),
    Verb(
        "distill.Distiller",
        sk.distill.Distiller,
        lambda: {
            "student": network().train(),
            "teacher": network(),
            "losses": [sk.distill.KD()],
            "example_inputs": images(),
        },
        share=2,
    ),
    Verb(
        "distill.MutualLearning",
        sk.distill.MutualLearning,
        lambda: {"student": network(), "peers": network(), "losses": [sk.distill.KD()]},
    ),
    Verb("train.fit", sk.train.fit, _fit_arguments, changes=True, share=2),
    Verb(
        "train.reestimate_batch_norm",
        sk.train.reestimate_batch_norm,
        lambda: {"model": network(), "batches": image_batches()},
        changes=True,
    ),
    Verb(
        "train.WeightAverage",
        sk.train.WeightAverage,
        lambda: {"model": network(), "decay": 0.9},
        share=0.5,
    ),
    Verb("reparam.fuse", sk.reparam.fuse, _on_network(), _same_answers, share=2),
    Verb(
        "apply",
        sk.apply,
        lambda: {"model": network(), "plan": _plan()},
        changes=True,
        share=2,
    ),
    Verb("Plan.save", _plan().save, lambda: {"path": "plan.json"}),
    Verb("Plan.load", sk.Plan.load, lambda: {"path": _plan_file()}),
    Verb(
        "save",
        sk.save,
        lambda: {"model": network(), "directory": "saved"},
        _folder_there,
        share=2,
    ),
    Verb(
        "load",
        sk.load,
        lambda: {"directory": _saved(), "model": network()},
        _network_loaded,
        changes=True,
        share=2,
    ),
    Verb(
        "load_checkpoint",
        load_checkpoint,
        lambda: {"model": network(), "path": _weights()},
        changes=True,
    ),
    Verb("example_input", example_input, lambda: {"name": "slimkit:resnet20", "model": network()}),
    Verb("export", sk.export, _on_network(path="net.onnx"), _file_there, share=0.7),
    Verb(
        "benchmark",
        sk.benchmark,
        lambda: {"model": _onnx(), "runs": 2, "warmup": 0},
        _timed,
        share=2,
    ),
    Verb(
        "benchmark of a module",
        sk.benchmark,
        lambda: {
            "model": network(),
            "backend": "torch",
            "inputs": images(),
            "runs": 2,
            "warmup": 0,
        },
        _timed,
        share=2,
    ),
    Verb(
        "benchmark_interleaved",
        benchmark_interleaved,
        lambda: {"models": {"a": _onnx()}, "runs": 2, "warmup": 0},
    ),
    Verb("runtime.open_session", runtime.open_session, _on_file()),
    Verb("runtime.fusion_report", runtime.fusion_report, _on_file(), share=0.5),
    Verb(
        "runtime.parity",
        runtime.parity,
        lambda: {"model": network(), "path": _onnx(), "batches": image_batches()},
    ),
    Verb(
        "runtime.parity_per_layer", runtime.parity_per_layer, _on_file(batches=BATCHES), share=0.5
    ),
    Verb("search", sk.search.search, _in_search, share=2),
    Verb(
        "graph.check_equivalence",
        graph.check_equivalence,
        lambda: {"model": network(), "plan": _plan(), "example_inputs": images()},
    ),
    Verb(
        "graph.match_modules",
        graph.match_modules,
        lambda: {"model": network(), "patterns": "first*"},
    ),
    Verb(
        "graph.dependency_groups",
        graph.dependency_groups,
        lambda: {"model": _captured()[0], "graph": _captured()[1]},
    ),
    Verb(
        "graph.batch_norm_pairs",
        graph.batch_norm_pairs,
        lambda: {"model": _captured()[0], "graph": _captured()[1]},
    ),
)
"""All that is fuzzed."""
