"""Odd recipes: the shipped ones with fields removed, retyped, misspelt or out of range."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fuzz.mutations import damaged_bytes, damaged_value
from benchmarks.fuzz.outcomes import Case
from benchmarks.tables import ROOT

__all__ = ["cases"]

_SETTINGS = (
    *("stages.prune.macs=0.5", "stages.prune.ratio=2", "seed=-1", "data.batch_size=1e9", "=", "a"),
    *(
        "stages.train.epochs=.inf",
        "stages..epochs=1",
        "variants.x=[train]",
        "data.source=nowhere:a",
    ),
    *("stages.train.teacher=itself", "model.name=slimkit:resnet21", "measure.backends=[]"),
    *("stages.train={}", "task=segments", "stages.prune.criterion={type: l2, x: 1}", "data=null"),
    *("data.augment.crop=1000000000", "measure.threads=5000", "stages.int8.batches=0"),
)
"""What may be given to ``--set``."""


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    """``count`` cases, the same for the same seed: a shipped recipe, damaged, is read."""
    sources = sorted((ROOT / "recipes").rglob("*.yaml"))
    numbers = random.Random(seed)
    for number in range(count):
        yield _case(number, sources[number % len(sources)], folder, random.Random(numbers.random()))


def _case(number: int, source: Path, folder: Path, numbers: random.Random) -> Case:
    def act() -> object:
        from slimkit.recipe import load_recipe, parse_recipe

        text = source.read_text(encoding="utf-8")
        kind = numbers.randrange(4)
        if kind == 0:
            path = folder / "damaged.yaml"
            path.write_bytes(damaged_bytes(text.encode(), numbers))
            return load_recipe(path)
        if kind == 1:
            chosen = [numbers.choice(_SETTINGS) for _ in range(1 + (numbers.random() < 0.3))]
            return load_recipe(source, chosen)
        value: Any = damaged_value(yaml.safe_load(text), numbers)
        if kind == 2:
            return parse_recipe(value)
        path = folder / "changed.yaml"
        path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
        return load_recipe(path)

    return Case(f"recipe {source.stem} #{number}", act)
