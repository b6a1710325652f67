"""PicoDet-S with the weights of Paddle's ONNX file, as a checkpoint of ours.

    python -m benchmarks.picodet_weights IN.onnx OUT.safetensors [--images DIR]

The file holds convolutions with their batch norms folded in. In the order of execution they are
those of our network; the norms become the identity plus the folded bias. Outputs in evaluation
are equal, but training would begin with other statistics than the identity's. With ``--images``
the norms get the statistics of these images, and scales and shifts that undo them: equal in
evaluation, and nearly so in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from slimkit.artifact import write_tensors
from slimkit.errors import ModelError
from slimkit.models.picodet import PicoDet, picodet_s

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, RGB in [0, 1]: what the network was trained with."""


def folded_convolutions(path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias of every convolution of an ONNX file, in the order of the graph."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    values = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    for node in graph.node:
        if node.op_type == "Conv":
            weight, bias = (torch.tensor(np.array(values[name])) for name in node.input[1:3])
            yield weight, bias.flatten()


@torch.no_grad()
def load_folded(model: PicoDet, path: Path) -> None:
    """Fill ``model`` in place.

    Raises:
        ModelError: the file's convolutions are not those of the network.
    """
    ran: list[nn.Conv2d] = []
    hooks = [
        module.register_forward_hook(lambda layer, _args, _out: ran.append(layer))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    model.eval()(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    given = list(folded_convolutions(path))
    wanted = [tuple(layer.weight.shape) for layer in ran]
    if [tuple(weight.shape) for weight, _ in given] != wanted:
        raise ModelError(
            f"{len(given)} convolutions that are not the {len(wanted)} of PicoDet-S in order",
            where=str(path),
        )
    norms = {module.conv: module.norm for module in model.modules() if hasattr(module, "norm")}
    for layer, (weight, bias) in zip(ran, given, strict=True):
        layer.weight.copy_(weight)
        if layer in norms:
            norm = norms[layer]
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0)
            norm.weight.fill_((1 + norm.eps) ** 0.5)  # undoes the ε under the root
            norm.bias.copy_(bias)
        elif layer.bias is not None:
            layer.bias.copy_(bias)


@torch.no_grad()
def unfold(model: PicoDet, images: Tensor) -> None:
    """Give every batch norm the statistics of ``images`` without changing what it computes."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def look(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[norm] = (args[0].mean((0, 2, 3)), args[0].var((0, 2, 3)))

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        mean, var = seen[norm]
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias.add_((mean - norm.running_mean) * slope)
        norm.weight.copy_(slope * (var + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def read_images(folder: Path, size: int, limit: int) -> Tensor:
    """At most ``limit`` normalised RGB images, resized to a square, (N, 3, size, size)."""
    from PIL import Image

    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".png"})
    if not found:
        raise SystemExit(f"{folder}: no .jpg or .png in it")
    pixels = []
    for path in found[:limit]:
        image = Image.open(path).convert("RGB")
        resized = image.resize((size, size), Image.Resampling.BILINEAR)
        pixels.append(np.asarray(resized, dtype=np.float32) / 255)
    batch = (np.stack(pixels) - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path, help="picodet_s_320_coco.onnx")
    parser.add_argument("target", type=Path, help="the checkpoint to write, .safetensors")
    parser.add_argument("--images", type=Path, help="folder of images for the norms' statistics")
    parser.add_argument("--limit", type=int, default=64, help="images to read (default: 64)")
    chosen = parser.parse_args()
    model = picodet_s()
    load_folded(model, chosen.source)
    if chosen.images is not None:
        unfold(model, read_images(chosen.images, 320, chosen.limit))
    write_tensors(chosen.target, model.state_dict())
    print(f"{chosen.target}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
