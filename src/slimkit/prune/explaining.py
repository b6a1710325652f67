"""Plans in words: one line per layer, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimkit.measure.tables import human_count, rendered
from slimkit.prune.costing import Cost

__all__ = ["LayerChange", "explanation"]


@dataclass(frozen=True)
class LayerChange:
    """What happens to one layer.

    Attributes:
        name: module path (or parameter name where a module has several weights).
        type: class name of the module.
        channels: output channels before.
        kept: output channels that stay.
        inputs: input channels before.
        inputs_kept: input channels that stay.
        groups: names of the groups that its output channels belong to.
        reason: why all stay; None if some go.
        sets: (sets before, channels of this layer in each) where channels leave in sets, as
            those of attention heads and grouped convolutions do.
        linked: a layer of another group that keeps the same fraction.
    """

    name: str
    type: str
    channels: int
    kept: int
    inputs: int
    inputs_kept: int
    groups: tuple[str, ...]
    reason: str | None
    sets: tuple[int, int] | None = None
    linked: str | None = None


def _arrow(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} → {after}"


def explanation(
    model: str,
    layers: Sequence[LayerChange],
    before: Cost,
    after: Cost,
    settings: Mapping[str, Any],
) -> str:
    """The table of :meth:`PrunePlan.explain` with its totals."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "type"):
        table.add_column(heading, no_wrap=True)
    for heading in ("inputs", "channels", "removed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("group, or why all channels stay", no_wrap=True)
    members: dict[str, list[str]] = {}
    for layer in layers:
        for group in layer.groups:
            members.setdefault(group, []).append(layer.name)
    for layer in layers:
        removed = layer.channels - layer.kept
        table.add_row(
            layer.name,
            layer.type,
            _arrow(layer.inputs, layer.inputs_kept),
            _arrow(layer.channels, layer.kept),
            f"{100 * removed / layer.channels:.0f} %" if removed else "",
            _note(layer, members),
        )
    told = {"measured_ms", "backend", "threads"} if "measured_ms" in settings else set()
    how = ", ".join(
        f"{key}={value}"
        for key, value in settings.items()
        if value not in (None, []) and key not in {*told, "warnings"}
    )
    lines = [
        f"{model}: {how}" if how else model,
        rendered(table, width=200),
        f"MACs {_change(before.macs, after.macs)}; "
        f"parameters {_change(before.params, after.params)}",
    ]
    if told:
        lines.append(_latency(settings))
    lines += [f"warning: {text}" for text in settings.get("warnings", ())]
    return "\n".join(lines)


def _latency(settings: Mapping[str, Any]) -> str:
    """``latency 7.1 → 4.2 ms (−41 %), measured in onnxruntime, 1 thread``."""
    before, after = settings["measured_ms"]
    threads = f"{settings['threads']} thread" + ("" if settings["threads"] == 1 else "s")
    return (
        f"latency {before:.3g} → {after:.3g} ms (−{100 * (1 - after / before):.0f} %), "
        f"measured in {settings['backend']}, {threads}"
    )


def _note(layer: LayerChange, members: Mapping[str, Sequence[str]]) -> str:
    tied = dict.fromkeys(
        name for group in layer.groups for name in members[group] if name != layer.name
    )
    shown = list(tied)[:2]
    more = f" and {len(tied) - len(shown)} more" if len(tied) > len(shown) else ""
    if layer.reason is not None:
        return f"all stay: {layer.reason}"
    text = f"with {', '.join(shown)}{more}" if shown else "its own"
    if layer.sets is not None:
        text += f", in {layer.sets[0]} sets of {layer.sets[1]}"
    if layer.linked in layer.groups:
        return f"{text}; its parts keep the same fraction"
    return f"{text}; same fraction as {layer.linked}" if layer.linked not in (None, *tied) else text


def _change(before: int, after: int) -> str:
    change = f" (−{100 * (before - after) / before:.1f} %)" if before and after != before else ""
    return f"{human_count(before)} → {human_count(after)}{change}"
