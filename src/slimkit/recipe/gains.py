"""Which stages of a recipe made nothing faster: every variant beside those that leave them out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.errors import SlimkitError
from slimkit.recipe.schema.links import stage_of

if TYPE_CHECKING:
    from slimkit.measure.layer_latency import LayerTime
    from slimkit.recipe.schema.recipe import Recipe

__all__ = ["slower_operators", "without_gain"]

_SPEEDS_UP = frozenset({"prune", "ptq", "qat"})
"""Types of stages that are there to save milliseconds, among other things."""
_NO_GAIN = 0.98
"""Part of the milliseconds above which nothing was gained: medians scatter by about 1 %."""
_NAMED = 3
"""Kinds of operators that a warning names."""


def without_gain(
    recipe: Recipe,
    latency: Mapping[str, Sequence[Mapping[str, Any]]],
    files: Mapping[str, Path] | None = None,
) -> dict[str, list[str]]:
    """Variants that are no faster than another one with fewer of their stages.

    Args:
        recipe: with the stages of every variant.
        latency: variant name → one measurement per backend, in the same order for all.
        files: variant name → ONNX file, in which the operators that became slower are looked for.

    Returns:
        Variant name → one sentence per backend and shorter variant; a list for every variant.
    """
    found: dict[str, list[str]] = {name: [] for name in latency}
    for name in latency:
        for other in latency:
            gone = _left_out(recipe.variants[name], recipe.variants[other])
            stages = [link for link in gone if recipe.stages[stage_of(link)].type in _SPEEDS_UP]
            if not stages:
                continue
            for before, after in zip(latency[other], latency[name], strict=True):
                if after["median_ms"] < _NO_GAIN * before["median_ms"]:
                    continue
                text = (
                    f"{' and '.join(stages)} gained no speed: {after['median_ms']:.3g} ms in "
                    f"{after['backend']}, {before['median_ms']:.3g} ms without ({other})"
                )
                blamed = _blamed(files, (other, name), after) if files else []
                found[name].append(f"{text}; slower are {', '.join(blamed)}" if blamed else text)
    return found


def _left_out(chain: Sequence[str], other: Sequence[str]) -> list[str]:
    """What ``chain`` has beside ``other``; nothing unless all of ``other`` is in it, in order."""
    rest, gone = list(other), []
    for link in chain:
        if rest and rest[0] == link:
            rest.pop(0)
        else:
            gone.append(link)
    return [] if rest else gone


def _blamed(
    files: Mapping[str, Path], pair: tuple[str, str], timing: Mapping[str, Any]
) -> list[str]:
    if timing["backend"] != "onnxruntime":
        return []
    from slimkit.measure.layer_latency import layer_times

    try:
        before, after = (
            layer_times(files[name], threads=timing["threads"], batch=timing["batch"]).values()
            for name in pair
        )
    except SlimkitError:  # the warning is true without the names, too
        return []
    return slower_operators(before, after)


def slower_operators(before: Iterable[LayerTime], after: Iterable[LayerTime]) -> list[str]:
    """Kinds of operators that take longer in the second file, the worst first.

    Args:
        before: of a file, by :func:`slimkit.measure.layer_latency.layer_times`.
        after: of another file of the same network.
    """
    ms: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for place, layers in enumerate((before, after)):
        for layer in layers:
            ms[layer.type][place] += layer.ms
    risen = sorted(ms.items(), key=lambda item: item[1][0] - item[1][1])
    return [
        f"{kind} ({old:.3f} → {new:.3f} ms)" for kind, (old, new) in risen[:_NAMED] if new > old
    ]
