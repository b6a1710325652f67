"""The MobileNetV1×0.5 of ``recipes/cifar10/mobilenet_v1.yaml`` as where other comparisons begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.tables import ROOT
from slimkit.recipe import Recipe, load_recipe, parse_recipe

__all__ = ["RECIPE", "variation"]

RECIPE = ROOT / "recipes" / "cifar10" / "mobilenet_v1.yaml"


def variation(
    name: str,
    seed: int,
    variants: Mapping[str, Sequence[str]],
    stages: Mapping[str, Any] | None = None,
    *,
    limit: int | None = None,
    epochs: float | None = None,
) -> Recipe:
    """The recipe with other variants; stages that it has itself come from the cache where it ran.

    Args:
        name: of the new recipe.
        seed: of everything random in it.
        variants: chains of the recipe's stages and of new ones.
        stages: the new ones.
        limit: images per split, for a quick look.
        epochs: of the recipe's own trainings, for a quick look.
    """
    values = load_recipe(RECIPE).model_dump(mode="json")
    own = values["stages"]
    if limit is not None:
        values["data"] |= {"limit": limit, "validation": limit // 10}
    if epochs is not None:
        for stage in own.values():
            if "epochs" in stage:
                stage["epochs"] = epochs
    used = dict.fromkeys(stage for chain in variants.values() for stage in chain)
    chosen = {stage: (stages or {}).get(stage) or own[stage] for stage in used}
    asked = {stage.get("teacher") for stage in chosen.values()}
    return parse_recipe(
        {
            **values,
            "name": name,
            "seed": seed,
            "teachers": {key: value for key, value in values["teachers"].items() if key in asked},
            "stages": chosen,
            "variants": {variant: list(chain) for variant, chain in variants.items()},
            "measure": {"seconds": 0.2, "parity_batches": 1},
            "require": {},
        }
    )
