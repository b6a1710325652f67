"""Networks for CIFAR-10 that are hard to quantize.

In a file of their own: a recipe trains a network anew when the file that builds it changes.
"""

from __future__ import annotations

from torch import nn

__all__ = ["collapsed", "mobilenet_v3", "rep_vgg"]


def rep_vgg() -> nn.Module:
    """Ten blocks of timm's RepVGG on 32, 16 and 8 pixels."""
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    stages = [(24, 3, 1), (48, 3, 2), (96, 3, 2)]
    blocks = tuple(ByoBlockCfg(type="rep", d=d, c=c, s=s, gs=0) for c, d, s in stages)
    config = ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=24, stem_pool="")
    model: nn.Module = ByobNet(config, num_classes=10)
    return _at_full_size(model.get_submodule("stem"), model)


def mobilenet_v3() -> nn.Module:
    """Torchvision's small one, the first two strides left out: 4 × 4 pixels at its end."""
    from torchvision.models import mobilenet_v3_small

    model: nn.Module = mobilenet_v3_small(num_classes=10)
    return _at_full_size(model.get_submodule("features.0.0"), model, "features.1.block.0.0")


def _at_full_size(first: nn.Module, model: nn.Module, *others: str) -> nn.Module:
    for part in (first, *(model.get_submodule(name) for name in others)):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
    return model


def collapsed(model: nn.Module) -> nn.Module:
    """Branches of RepVGG blocks summed into one convolution each; another network as it is."""
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model)
