"""The networks that coverage is measured on, and running one measurement on all of them.

Every torchvision network, the smallest network of every timm module, and a Hugging Face BERT, all
with random weights.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimkit as sk
from benchmarks.tables import ROOT
from slimkit.inputs import as_inputs
from slimkit.models import example_input

__all__ = ["LARGEST", "build", "guarded", "names_of", "records_of", "shake", "supervise", "work"]

LARGEST = 150e6
"""Parameters of the largest network that is counted."""
TIME_LIMIT = 3600
Measure = Callable[[str], dict[str, Any]]


# --- the networks ------------------------------------------------------------------------


def torchvision_names() -> list[str]:
    """All networks but the quantized ones, which are other's int8 copies of the same."""
    from torchvision.models import list_models

    return [f"torchvision:{n}" for n in list_models() if not n.startswith("quantized_")]


def smallest_of_timm() -> list[str]:
    """The smallest network of every timm module, by parameters."""
    import timm

    found = []
    for module in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=module):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except Exception:
                continue
            sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes:
            found.append("timm:" + min(sizes, key=lambda n: (sizes[n], n)))
    return list(dict.fromkeys(found))


def build(name: str) -> tuple[nn.Module, Any]:
    """The network, with random weights, and an example input."""
    library, _, rest = name.partition(":")
    torch.manual_seed(0)
    if library == "transformers":
        from transformers import BertConfig, BertModel

        model = BertModel(BertConfig(attn_implementation=rest.rpartition("-")[2]))
        return model, {"input_ids": torch.arange(1, 33).reshape(2, 16) * 7}
    extra: dict[str, Any] = {}
    if library == "torchvision" and rest in ("googlenet", "inception_v3"):
        extra = {"init_weights": True, "aux_logits": False}
    model = sk.build_model(name, **extra)
    return model, as_inputs(example_input(name, model)).map(torch.rand_like)


def shake(model: nn.Module) -> None:
    """Nothing constant: zero scales and equal statistics would hide a wrong channel."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        flat = parameter.data.flatten()
        if parameter.is_floating_point() and len(flat) > 1 and bool((flat == flat[0]).all()):
            noise = torch.empty(parameter.shape).uniform_(-0.1, 0.1, generator=generator)
            parameter.data.add_(noise.to(parameter.dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.data.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.data.uniform_(0.5, 1.5, generator=generator)


# --- all networks ------------------------------------------------------------------------


class TookTooLongError(Exception):
    """The time limit of one network."""


def guarded(name: str, measure: Measure) -> dict[str, Any]:
    """What ``measure(name)`` returns, or a record with every exception as its ``status``."""

    def late(*_: object) -> None:
        raise TookTooLongError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(TIME_LIMIT)
    try:
        return measure(name)
    except TookTooLongError:
        return {"name": name, "status": f"took longer than {TIME_LIMIT} s"}
    except Exception as error:
        return {"name": name, "status": f"{type(error).__name__}: {error}"[:400]}
    finally:
        signal.alarm(0)


def names_of(folder: Path) -> list[str]:
    """All names; timm's are looked up once."""
    cache = folder / "names.json"
    if not cache.exists():
        folder.mkdir(parents=True, exist_ok=True)
        bert = ["transformers:bert-eager", "transformers:bert-sdpa"]
        cache.write_text(json.dumps([*torchvision_names(), *smallest_of_timm(), *bert]))
    return list(json.loads(cache.read_text()))


def work(names: list[str], folder: Path, measure: Measure) -> None:
    """Measure, in this process, what has no record yet."""
    for name in names:
        path = folder / f"{name.replace(':', '_')}.json"
        if path.exists():
            continue
        path.write_text(json.dumps({"name": name, "status": "the process died"}))
        record = guarded(name, measure)
        path.write_text(json.dumps(record))
        print(f"{name}: {record['status']}", flush=True)


def supervise(module: str) -> None:
    """Run ``python -m module --worker`` until every name has a record, also if one is killed."""
    command = [sys.executable, "-m", module, "--worker", *sys.argv[1:]]
    while subprocess.run(command, cwd=ROOT, env=os.environ, check=False).returncode != 0:
        print("a worker died; going on with the next network", flush=True)


def records_of(folder: Path) -> list[dict[str, Any]]:
    """All records, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*_*.json"))]
