"""Pruning proved by equivalence: nine torchvision networks, half of their MACs removed.

A pruned network must compute what the original computes with the removed channels masked,
to float precision; no training is involved. Replaying the saved plan on a fresh network
must give identical outputs::

    python -m benchmarks.prune_equivalence
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
import torchvision

import slimkit as sk
from benchmarks.tables import markdown, write_page
from slimkit.graph.equivalence import check_equivalence

NETWORKS = (
    "resnet18",
    "mobilenet_v2",
    "vgg16_bn",
    "densenet121",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "googlenet",
    "regnet_y_400mf",
    "convnext_tiny",
)


def shake(model: torch.nn.Module) -> None:
    """Give every normalisation its own statistics, so that a wrong channel shows."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_(0, 0.1, generator=generator)


def main() -> None:
    """Measure all networks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of MACs to remove")
    parser.add_argument("--size", type=int, default=224, help="input height and width in pixels")
    options = parser.parse_args()
    rows = []
    for name in NETWORKS:
        torch.manual_seed(0)
        extra = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
        model = getattr(torchvision.models, name)(weights=None, **extra).eval()
        shake(model)
        example = torch.randn(1, 3, options.size, options.size)
        start = time.perf_counter()
        plan = sk.prune.plan(model, example, macs=options.macs)
        pruned = sk.apply(copy.deepcopy(model), plan)
        seconds = time.perf_counter() - start
        proof = check_equivalence(model, plan, example)
        with tempfile.TemporaryDirectory() as folder:
            again = sk.apply(
                copy.deepcopy(model), sk.Plan.load(plan.save(Path(folder) / "plan.json"))
            )
        with torch.no_grad():
            same = torch.equal(pruned(example), again(example))
        before, after = sk.profile(model, example), sk.profile(pruned, example)
        rows.append(
            [
                name,
                f"{before.macs / 1e6:.0f} → {after.macs / 1e6:.0f} M",
                f"{before.params / 1e6:.2f} → {after.params / 1e6:.2f} M",
                f"{proof.max_abs_diff:.1e}",
                f"{proof.max_abs_output:.3g}",
                f"{len(proof.masked_norms)} norms" if proof.masked_norms else "–",
                "identical" if same else "DIFFERENT",
                f"{seconds:.2f} s",
            ]
        )
        print(rows[-1], flush=True)
    header = [
        "network",
        "MACs",
        "parameters",
        "max abs difference",
        "largest output",
        "masked statistics",
        "replay",
        "capture + plan + apply",
    ]
    page = write_page(
        "prune_equivalence",
        "Pruning proved by equivalence",
        f"python -m benchmarks.prune_equivalence --macs {options.macs} --size {options.size}",
        [
            markdown(header, rows),
            "Random weights and random batch-norm statistics, one image. The difference is "
            "between the pruned network and the original whose removed channels are masked, both "
            "in double precision. *Masked statistics* counts the layer norms whose mean and "
            "variance were taken over the channels that stay, because removing channels changes "
            "them. Seconds are wall time of one run.",
        ],
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
