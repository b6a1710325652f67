"""Stages that made nothing faster are named, with the operators to blame."""

from __future__ import annotations

from typing import Any

from slimkit.measure.layer_latency import LayerTime
from slimkit.recipe.gains import slower_operators, without_gain
from slimkit.recipe.loading import parse_recipe
from slimkit.recipe.needs import untrained


def recipe(variants: dict[str, list[str]]) -> Any:
    """One with a stage of every kind."""
    stages = {
        "train": {"type": "train", "epochs": 1},
        "prune": {"type": "prune", "macs": 0.5},
        "recover": {"type": "train", "epochs": 1},
        "int8": {"type": "ptq"},
    }
    return parse_recipe(
        {
            "name": "r",
            "task": "classification",
            "data": {"source": "digits"},
            "model": {"name": "slimkit:resnet20"},
            "stages": stages,
            "variants": variants,
        }
    )


def times(**ms: float) -> dict[str, Any]:
    """Variant → one measurement."""
    return {name: [{"backend": "onnxruntime", "median_ms": value}] for name, value in ms.items()}


CHAINS = {
    "float": ["train"],
    "int8": ["train", "int8"],
    "fast": ["train", "prune", "recover", "int8"],
}


def test_pruning_that_makes_a_quantized_network_slower_is_said() -> None:
    found = without_gain(recipe(CHAINS), times(float=1.1, int8=0.534, fast=0.567))
    assert found["float"] == found["int8"] == []
    assert found["fast"] == [
        "prune gained no speed: 0.567 ms in onnxruntime, 0.534 ms without (int8)"
    ]


def test_integers_slower_than_float_are_said_and_gains_are_not() -> None:
    found = without_gain(recipe(CHAINS), times(float=0.25, int8=0.32, fast=0.2))
    assert found["int8"] == [
        "int8 gained no speed: 0.32 ms in onnxruntime, 0.25 ms without (float)"
    ]
    assert found["fast"] == []


def test_training_need_not_make_anything_faster() -> None:
    chains = {"float": ["train"], "longer": ["train", "recover"]}
    assert without_gain(recipe(chains), times(float=1.0, longer=1.0))["longer"] == []


def test_operators_that_became_slower_are_named_by_kind_the_worst_first() -> None:
    def layer(kind: str, ms: float) -> LayerTime:
        return LayerTime(f"{kind}{ms}", kind, ms, 0, "", ())

    before = [layer("Conv", 7.0), layer("Mul", 0.5), layer("Mul", 0.25), layer("Sigmoid", 1.0)]
    after = [layer("Conv", 5.0), layer("Mul", 3.0), layer("Sigmoid", 2.0)]
    assert slower_operators(before, after) == [
        "Mul (0.750 → 3.000 ms)",
        "Sigmoid (1.000 → 2.000 ms)",
    ]


def test_variants_of_random_weights_are_said() -> None:
    chains = {"start": [], "int8": ["int8"], "trained": ["train"]}
    assert untrained(recipe({"trained": ["train"]})) is None
    told = untrained(recipe(chains))
    assert told is not None
    assert "slimkit:resnet20 are random" in told
    assert "start, int8 trains nothing" in told
    with_weights = recipe(chains)
    model = with_weights.model.model_copy(update={"checkpoint": "weights.safetensors"})
    assert untrained(with_weights.model_copy(update={"model": model})) is None
