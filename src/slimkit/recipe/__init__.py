"""Recipes: typed YAML, content-addressed stages, and the runner that ends in a report.

::

    recipe = load_recipe("recipes/quickstart.yaml", ["stages.prune.macs=0.5"])
    report = run_recipe(recipe, "runs/half")
"""

from __future__ import annotations

from slimkit.recipe.loading import dump_recipe, load_recipe, parse_recipe
from slimkit.recipe.runner import preview_run, run_recipe
from slimkit.recipe.schema.recipe import Recipe, recipe_schema
from slimkit.recipe.stages.interface import STAGES, Stage, StageContext, StageResult

__all__ = [
    "STAGES",
    "Recipe",
    "Stage",
    "StageContext",
    "StageResult",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "preview_run",
    "recipe_schema",
    "run_recipe",
]
