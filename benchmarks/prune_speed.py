"""How long pruning itself takes, how that grows with the network, and how much memory it needs.

Beside Torch-Pruning, both in processes of their own, one thread, random weights: capture (or
trace), plan and apply at 30 % of the channels, magnitude, rounded to multiples of 8. First
Torch-Pruning is tried on every network of ``benchmarks.prune_coverage``; the two are compared on
those of its networks that take it longest, and on some that are well known::

    python -m benchmarks.prune_speed

Finished measurements are kept in ``runs/prune-speed``; a second call goes on with the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import networks
from benchmarks.tables import ROOT, markdown, write_page
from slimkit.graph.capturing import capture
from slimkit.inputs import as_inputs

RATIO = 0.3
SLOWEST = 12  # of those that the peer can do
KNOWN = tuple(
    f"torchvision:{name}"
    for name in (
        *("efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_b7", "efficientnet_b6"),
        *("resnet152", "resnext101_32x8d", "regnet_y_16gf", "inception_v3"),
    )
)
DENSE = tuple(f"torchvision:densenet{depth}" for depth in (121, 161, 169, 201))
LAST = (1000, 400, 21)  # classes of ImageNet, Kinetics and VOC: outputs that must stay
DEPTHS = (12, 24, 36, 48)


# --- one network, in a process of its own ------------------------------------------------------


def build(name: str) -> tuple[Any, Any]:
    """A network of the coverage table, or ``vit:DEPTH``, and an example input."""
    import torchvision

    if not name.startswith("vit:"):
        model, example = networks.build(name)
        return model.eval(), example
    torch.manual_seed(0)
    depth = int(name.partition(":")[2])
    model = torchvision.models.VisionTransformer(
        image_size=64, patch_size=8, num_layers=depth, num_heads=4, hidden_dim=256, mlp_dim=1024
    )
    return model.eval(), torch.randn(1, 3, 64, 64)


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

    inputs = as_inputs(example)
    single = inputs.args[0] if len(inputs.args) == 1 else inputs.args
    outputs = {nn.Linear: "out_features", nn.Conv2d: "out_channels", nn.Conv3d: "out_channels"}
    start = time.perf_counter()
    last = [m for m in model.modules() if getattr(m, outputs.get(type(m), ""), 0) in LAST]
    pruner = tp.pruner.BasePruner(
        model,
        dict(inputs.kwargs) or single,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=last,
        round_to=8,
    )
    traced = time.perf_counter()
    pruner.step()
    return {"plan": traced - start, "seconds": time.perf_counter() - start}


def one(who: str, name: str) -> dict[str, Any]:
    """Time and memory of one network, after a small one has brought in all libraries."""
    import psutil

    torch.set_num_threads(1)
    method = ours if who == "ours" else peers
    warm, example = build("torchvision:resnet18")
    method(warm, example)
    model, example = build(name)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if who == "memory":
        import slimkit as sk

        before = psutil.Process().memory_info().rss
        sk.prune.plan(model, example, ratio=RATIO)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"weights": weights, "memory": max(peak - before, 0)}
    params = sum(p.numel() for p in model.parameters())
    with torch.no_grad():  # both find the weights in memory and the kernels built
        as_inputs(example).call(model)
    found: dict[str, Any] = method(model, example)
    with torch.no_grad():  # a network that does not run does not count
        as_inputs(example).call(model)
    fell = 1 - sum(p.numel() for p in model.parameters()) / params
    operators = len(capture(model, example).ops)  # as many as before
    return {**found, "weights": weights, "operators": operators, "fell": fell}


# --- all networks ------------------------------------------------------------------------------


class Runner:
    """Runs single measurements in processes and keeps what they say."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)

    def __call__(self, who: str, name: str, repeat: int = 0) -> dict[str, Any]:
        """The record of a measurement; with ``error`` if there is no result."""
        options = self.options
        file = options.out / f"{who}_{name.replace(':', '_')}_{repeat}.json"
        if not file.exists():
            record = self._measured(who, name)
            file.write_text(json.dumps(record))
            shown = {k: round(v, 3) for k, v in record.items() if isinstance(v, int | float)}
            print(f"{who:14} {name}: {record.get('error') or shown}", flush=True)
        return dict(json.loads(file.read_text()))

    def _measured(self, who: str, name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.prune_speed", "--one", who, name]
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


def screen(folder: Path, limit: float) -> dict[str, dict[str, Any]]:
    """Torch-Pruning on every network of the coverage table: seconds, or why not.

    Each in a process forked from one that has loaded the libraries, so that hundreds of
    networks take minutes; the networks chosen by this are measured again, in fresh processes.
    """
    torch.set_num_threads(1)
    file = folder / "screen.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    warm, example = build("torchvision:resnet18")
    peers(warm, example)
    for name in networks.names_of(folder):
        if name in found:
            continue
        found[name] = _forked(name, limit)
        file.write_text(json.dumps(found, indent=1))
        print(f"screen {name}: {found[name]}", flush=True)
    return dict(found)


def _forked(name: str, limit: float) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_screened, args=(name, send))
    child.start()
    send.close()
    try:
        if not receive.poll(limit):
            return {"error": f"not finished in {limit:g} s"}
        return dict(receive.recv())
    except EOFError:
        return {"error": "the process died"}
    finally:
        child.kill()
        child.join()


def _screened(name: str, send: Any) -> None:
    warnings.simplefilter("ignore")
    try:
        model, example = build(name)
        params = sum(p.numel() for p in model.parameters())
        if params > networks.LARGEST:
            send.send({"error": "larger than 150 M parameters"})
            return
        record = peers(model, example)
        with torch.no_grad():
            as_inputs(example).call(model)
        record["fell"] = 1 - sum(p.numel() for p in model.parameters()) / params
        send.send(record)
    except Exception as error:  # whatever stops the peer is what the table says
        send.send({"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]})


def comparison(run: Runner, names: list[str], repeats: int) -> str:
    """Ours beside the peer's, in turns, sorted by the peer's time."""
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
        seconds = [f"{mine:.2f} s", f"{theirs:.2f} s", f"{ratio:.1f}×"]
        rows.append((theirs, mine, [name, *seconds, *fell]))
    rows.sort(key=lambda row: -row[0])
    mine, theirs = sum(row[1] for row in rows), sum(row[0] for row in rows)
    total = f"Together: {mine:.1f} s and {theirs:.1f} s, {theirs / max(mine, 1e-9):.1f}×."
    header = ["network", "ours", "Torch-Pruning", "ratio", "parameters, ours", "Torch-Pruning"]
    table = f"{markdown(header, [row for *_, row in rows])}\n\n{total}"
    return f"{table}\n\nNot compared: {'; '.join(failed)}." if failed else table


def beside(run: Runner, screened: dict[str, dict[str, Any]], repeats: int) -> str:
    """The two tables beside the peer, and what it cannot do."""
    done = {name: r["seconds"] for name, r in screened.items() if r.get("fell", 0) > 0}
    larger = [name for name, r in screened.items() if r.get("error", "").startswith("larger")]
    late = [name for name, r in screened.items() if "finished" in r.get("error", "")]
    slowest = sorted(done, key=lambda name: -done[name])[:SLOWEST]
    known = [name for name in KNOWN if name in done and name not in slowest]
    counted = len(screened) - len(larger)
    about = f"Of {counted} networks Torch-Pruning prunes {len(done)}"
    if late:
        about += f"; it does not finish within the time limit on {', '.join(late)}"
    sections = [
        "## Beside Torch-Pruning",
        f"{about}. Of those that it prunes, the {len(slowest)} that take it longest:",
        comparison(run, slowest, repeats),
    ]
    if known:
        sections += ["Well-known networks that take it less:", comparison(run, known, repeats)]
    return "\n\n".join(sections)


def growth(run: Runner, depths: list[int], dense: list[str]) -> str:
    """Seconds per operator as networks grow."""
    rows = []
    for name in [*dense, *(f"vit:{depth}" for depth in depths)]:
        found = run("ours", name)
        if "error" in found:
            rows.append([name, "–", "–", found["error"]])
            continue
        seconds, operators = found["seconds"], found["operators"]
        shown = name.replace("vit:", "ViT, depth ").removeprefix("torchvision:")
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
    parser.add_argument("--repeats", type=int, default=1, help="of each pair, taken in turns")
    parser.add_argument("--time-limit", type=float, default=120, help="seconds per network")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "prune-speed")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one)))
        return
    run = Runner(options)
    screened = screen(options.out, options.time_limit)
    sections = [
        beside(run, screened, options.repeats),
        growth(run, list(DEPTHS), list(DENSE)),
        memory(run, [*DENSE, *KNOWN]),
        "One example of the size the network was made for (ViT 64 × 64 pixels, width 256), one "
        f"thread, {100 * RATIO:.0f} % of the channels of every group, random weights. Each "
        "figure is of a process of its own, after a ResNet-18 has brought in all libraries; "
        f"limit {options.time_limit:g} s.",
    ]
    flags = f" --time-limit {options.time_limit:g}"
    flags += f" --repeats {options.repeats}" if options.repeats > 1 else ""
    page = write_page(
        "prune_speed",
        "How long pruning takes",
        f"python -m benchmarks.prune_speed{flags}",
        sections,
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
