"""How long pruning itself takes, how that grows with the network, and how much memory it needs.

Beside Torch-Pruning, both in processes of their own, one thread, random weights: capture (or
trace), plan and apply at 30 % of the channels, magnitude, rounded to multiples of 8::

    python -m benchmarks.prune_speed

Finished measurements are kept in ``runs/prune-speed``; a second call goes on with the others.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.tables import ROOT, markdown, write_page

RATIO = 0.3
SLOWEST = 12  # of those that the peer can do
NETWORKS = (  # torchvision's with the most operators that the peer can do, and neighbours
    *("densenet201", "densenet169", "densenet161", "densenet121"),
    *("efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_v2_s"),
    *("efficientnet_b7", "efficientnet_b6", "efficientnet_b5", "efficientnet_b4"),
    *("resnet152", "resnext101_32x8d", "regnet_y_16gf", "regnet_x_16gf", "inception_v3"),
)
DENSE = ("densenet121", "densenet161", "densenet169", "densenet201")
DEPTHS = (12, 24, 36, 48)


# --- one network, in a process of its own ------------------------------------------------------


def build(name: str, size: int) -> tuple[Any, Any]:
    """A network of torchvision, or ``vit:DEPTH``, and an image of its size."""
    import torch
    import torchvision

    torch.manual_seed(0)
    if name.startswith("vit:"):
        depth = int(name.partition(":")[2])
        model = torchvision.models.VisionTransformer(
            image_size=64, patch_size=8, num_layers=depth, num_heads=4, hidden_dim=256, mlp_dim=1024
        )
        return model.eval(), torch.randn(1, 3, 64, 64)
    extra = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    model = torchvision.models.get_model(name, weights=None, **extra).eval()
    side = max(size, 299) if name == "inception_v3" else size
    return model, torch.randn(1, 3, side, side)


def ours(model: Any, example: Any) -> dict[str, float]:
    """Capture and plan, then apply: seconds of each."""
    import slimkit as sk

    start = time.perf_counter()
    plan = sk.prune.plan(model, example, ratio=RATIO)
    planned = time.perf_counter()
    sk.apply(model, plan)
    return {"plan": planned - start, "seconds": time.perf_counter() - start}


def peers(model: Any, example: Any) -> dict[str, float]:
    """Torch-Pruning: trace (with its constructor), then decide and prune."""
    import torch_pruning as tp
    from torch import nn

    start = time.perf_counter()
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=last,
        round_to=8,
    )
    traced = time.perf_counter()
    pruner.step()
    return {"plan": traced - start, "seconds": time.perf_counter() - start}


def one(who: str, name: str, size: int) -> dict[str, Any]:
    """Time and memory of one network, after a small one has brought in all libraries."""
    import psutil
    import torch

    torch.set_num_threads(1)
    method = ours if who == "ours" else peers
    warm, example = build("resnet18", 64)
    method(warm, example)
    model, example = build(name, size)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if who == "memory":
        import slimkit as sk

        before = psutil.Process().memory_info().rss
        sk.prune.plan(model, example, ratio=RATIO)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"weights": weights, "memory": max(peak - before, 0)}
    operators = len(_capture(model, example)) if who == "ours" else 0
    params = sum(p.numel() for p in model.parameters())
    found: dict[str, Any] = method(model, example)
    with torch.no_grad():  # a network that does not run does not count
        model(example)
    fell = 1 - sum(p.numel() for p in model.parameters()) / params
    return {**found, "weights": weights, "operators": operators, "fell": fell}


def _capture(model: Any, example: Any) -> Any:
    from slimkit.graph.capturing import capture
    from slimkit.inputs import as_inputs

    return capture(model, as_inputs(example)).ops


# --- all networks ------------------------------------------------------------------------------


class Runner:
    """Runs single measurements in processes and keeps what they say."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)

    def __call__(self, who: str, name: str, repeat: int = 0) -> dict[str, Any]:
        """The record of a measurement; with ``error`` if there is no result."""
        options = self.options
        file = options.out / f"{who}_{name.replace(':', '')}_{options.size}_{repeat}.json"
        if not file.exists():
            record = self._measured(who, name)
            file.write_text(json.dumps(record))
            shown = {k: round(v, 3) for k, v in record.items() if isinstance(v, int | float)}
            print(f"{who:14} {name}: {record.get('error') or shown}", flush=True)
        return dict(json.loads(file.read_text()))

    def _measured(self, who: str, name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.prune_speed", "--one", who, name]
        command += ["--size", str(self.options.size)]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=self.options.time_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"more than {self.options.time_limit:g} s"}
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or ["died"])[-1][:160]}
        return dict(json.loads(done.stdout.splitlines()[-1]))


def comparison(run: Runner, names: list[str], repeats: int) -> str:
    """Ours beside the peer's, in turns; the networks on which the peer is slowest."""
    rows, failed = [], []
    for name in names:
        pairs = [(run("ours", name, r), run("torch_pruning", name, r)) for r in range(repeats)]
        errors = [mine.get("error") or theirs.get("error") for mine, theirs in pairs]
        if any(errors):
            failed.append(f"{name} ({next(error for error in errors if error)})")
            continue
        mine = statistics.median(pair[0]["seconds"] for pair in pairs)
        theirs = statistics.median(pair[1]["seconds"] for pair in pairs)
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
        fell = [f"−{100 * pair['fell']:.0f} %" for pair in pairs[0]]
        seconds = [f"{mine:.2f} s", f"{theirs:.2f} s", f"{ratio:.0f}×"]
        rows.append((theirs, [name, *seconds, *fell]))
    rows.sort(key=lambda row: -row[0])
    header = ["network", "ours", "Torch-Pruning", "ratio", "parameters, ours", "Torch-Pruning"]
    table = markdown(header, [row for _, row in rows[:SLOWEST]])
    rest = [str(row[0]) for _, row in rows[SLOWEST:]]
    notes = [f"The {SLOWEST} of {len(rows)} networks on which Torch-Pruning is slowest."]
    if rest:
        notes.append(f"It takes less time for {', '.join(rest)}.")
    if failed:
        notes.append(f"Not compared: {'; '.join(failed)}.")
    return f"## Beside Torch-Pruning\n\n{table}\n\n{' '.join(notes)}"


def growth(run: Runner, depths: list[int], dense: list[str]) -> str:
    """Seconds per operator as networks grow."""
    rows = []
    for name in [*dense, *(f"vit:{depth}" for depth in depths)]:
        found = run("ours", name)
        if "error" in found:
            rows.append([name, "–", "–", found["error"]])
            continue
        seconds, operators = found["seconds"], found["operators"]
        shown = name.replace("vit:", "ViT, depth ")
        each = f"{1e3 * seconds / operators:.2f} ms"
        rows.append([shown, str(operators), f"{seconds:.2f} s", each])
    header = ["network", "operators", "capture + plan + apply", "per operator"]
    return f"## Growth\n\n{markdown(header, rows)}"


def memory(run: Runner, names: list[str]) -> str:
    """Peak memory of capture and plan against two times the weights and 500 MB."""
    rows = []
    for name in names:
        found = run("memory", name)
        if "error" in found:
            rows.append([name, "–", "–", "–", found["error"]])
            continue
        weights, peak = found["weights"] / 1e6, found["memory"] / 1e6
        bound = 2 * weights + 500
        within = "yes" if peak <= bound else "NO"
        rows.append([name, f"{weights:.0f} MB", f"{peak:.0f} MB", f"{bound:.0f} MB", within])
    header = ["network", "weights", "peak of capture + plan", "2 × weights + 500 MB", "within"]
    return (
        f"## Memory\n\n{markdown(header, rows)}\n\n"
        "The highest resident size of the process minus the size after importing and building."
    )


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="input height and width in pixels")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="of torchvision")
    parser.add_argument("--limit", type=int, help="the first so many only (quick look)")
    parser.add_argument("--repeats", type=int, default=1, help="of each pair, taken in turns")
    parser.add_argument("--time-limit", type=float, default=300, help="seconds per process")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "prune-speed")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one, options.size)))
        return
    run = Runner(options)
    names, depths = options.networks[: options.limit], list(DEPTHS)[: options.limit]
    dense = list(DENSE)[: options.limit]
    sections = [
        comparison(run, names, options.repeats),
        growth(run, depths, dense),
        memory(run, names),
        f"One image of {options.size} × {options.size} pixels (ViT 64 × 64, width 256), one "
        f"thread, {100 * RATIO:.0f} % of the channels of every group, random weights. Each "
        "figure is of a process of its own, after a ResNet-18 has brought in all libraries.",
    ]
    flags = f" --size {options.size}" + (f" --limit {options.limit}" if options.limit else "")
    flags += f" --repeats {options.repeats}"
    page = write_page(
        "prune_speed" + ("_quick" if options.limit else ""),
        "How long pruning takes",
        f"python -m benchmarks.prune_speed{flags}",
        sections,
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
