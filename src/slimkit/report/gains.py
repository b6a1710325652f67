"""Stages that were not worth it: variants compared with those that leave some stages out.

A report with ``int8`` alone and with ``prune → recover → int8`` says what pruning has gained. What
made a network smaller and not faster is easily overlooked in a table of changes against the
baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

from slimkit.report import words
from slimkit.report.reading import Report, StageRun, Variant

__all__ = ["lost_effort"]

_NOISE = 0.02
"""Share of a latency that another measurement may turn round."""


_TOLD = " gained no speed: "
"""In the warnings of a variant: see :mod:`slimkit.recipe.gains`."""


def lost_effort(report: Report) -> list[str]:
    """A sentence for each variant whose further stages gained nothing, or no time.

    A variant is compared with all others that have some of its stages, in the same order, and
    are not themselves contained in another such one.
    """
    found = []
    for variant in report.variants:
        if any(_TOLD in text for text in variant.warnings):
            continue  # the run has found that out, with the operators to blame
        for other in _nearest(variant, report.variants):
            text = _sentence(report, variant, other)
            if text:
                found.append(text)
    return found


def _same(one: StageRun, two: StageRun) -> bool:
    return one.name == two.name or (one.type, one.settings) == (two.type, two.settings)


def _further(variant: Variant, other: Variant) -> list[StageRun] | None:
    """Stages that only ``variant`` has, if ``other`` has nothing else; else None."""
    waiting, further = list(other.stages), []
    for stage in variant.stages:
        if waiting and _same(stage, waiting[0]):
            waiting.pop(0)
        else:
            further.append(stage)
    return further if further and not waiting else None


def _nearest(variant: Variant, variants: Sequence[Variant]) -> list[Variant]:
    within = [other for other in variants if _further(variant, other) is not None]
    return [
        other
        for other in within
        if not any(_further(third, other) is not None for third in within if third is not other)
    ]


def _sentence(report: Report, variant: Variant, other: Variant) -> str:
    """What the further stages did not gain; empty if they were worth it or train only."""
    further = _further(variant, other) or []
    now, before = variant.timed(report.setting), other.timed(report.setting)
    sizes = variant.cost.get("bytes"), other.cost.get("bytes")
    scores = report.score(variant), report.score(other)
    faster = (
        now is not None and before is not None and (now.median_ms < (1 - _NOISE) * before.median_ms)
    )
    smaller = None not in sizes and sizes[0] < 0.99 * sizes[1]  # type: ignore[operator]
    better = False
    if scores[0] is not None and scores[1] is not None:
        difference = scores[0] - scores[1]
        better = difference > 0 if report.head.higher_is_better else difference < 0
    if now is None or before is None or faster or (better and not _compresses(variant, other)):
        return ""
    what = "nothing" if not (smaller or better) else "no time"
    names = " → ".join(stage.name for stage in further)
    told = [f"{words.milliseconds(now.median_ms)} against {words.milliseconds(before.median_ms)}"]
    if None not in sizes:
        told.append(f"{words.size(sizes[0])} against {words.size(sizes[1])}")
    if scores[0] is not None and scores[1] is not None:
        told.append(report.head.told(scores[0] - scores[1]))
    doubt = " (times are unreliable)" if now.busy or before.busy else ""
    it = "it" if len(further) == 1 else "them"
    return (
        f"{variant.name}: {names} gained {what} over leaving {it} out, as {other.name} does: "
        f"{', '.join(told)}{doubt}"
    )


def _compresses(variant: Variant, other: Variant) -> bool:
    """Whether the variants differ in what they cost: training alone changes only the score."""
    pairs = [(variant.cost.get(key), other.cost.get(key)) for key in ("macs", "bops", "bytes")]
    return any(a is not None and b and abs(a / b - 1) > 0.01 for a, b in pairs)
