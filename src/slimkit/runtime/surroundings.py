"""What a measurement was taken on: CPU, its instructions, library versions, backends.

Times and int8 parity mean little without it: reports carry it, ``slimkit doctor`` prints it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import slimkit
from slimkit.runtime.sessions import available_backends

if TYPE_CHECKING:
    import torch

__all__ = [
    "cpu_instructions",
    "cpu_name",
    "environment",
    "int8_advice",
    "multiplies_bf16",
    "saturates_int8_pairs",
    "usable_cores",
]

_INSTRUCTIONS = {  # what /proc/cpuinfo calls it → what its makers call it
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "i8mm": "NEON I8MM",
    "sve": "SVE",
}
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")
_DOT_PRODUCTS = {"AVX-512 VNNI", "AVX-VNNI", "AMX INT8", "NEON dot product", "NEON I8MM"}
_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "accelerate",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "optuna",
    "timm",
    "transformers",
)


def environment() -> dict[str, Any]:
    """Everything that a reader needs to judge a measurement, as JSON-able values.

    Returns:
        ``slimkit`` and ``python`` version; ``platform``; ``cpu`` with ``name``, ``cores``
        (that this process may use), ``instructions`` and ``int8`` (advice, see
        :func:`int8_advice`); ``packages`` name → version or None; ``backends`` name →
        {``version``, ``reason``}; ``gpu`` names.
    """
    instructions = cpu_instructions()
    return {
        "slimkit": slimkit.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "name": cpu_name(),
            "cores": usable_cores(),
            "instructions": instructions,
            "int8": int8_advice(instructions),
        },
        "gpu": _gpus(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "backends": {
            name: {"version": status.version, "reason": status.reason}
            for name, status in available_backends().items()
        },
    }


def cpu_name() -> str:
    """The model of the CPU as the system reports it, or its architecture."""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def cpu_instructions() -> list[str]:
    """Those vector instructions of this CPU that decide how fast networks run.

    Read from ``/proc/cpuinfo``; where there is none, the one level that torch reports.
    """
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    if found:
        flags = set(found[1].split())
        return [name for flag, name in _INSTRUCTIONS.items() if flag in flags]
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return [] if capability == "DEFAULT" else [capability]


def int8_advice(instructions: list[str]) -> str:
    """What to expect of int8 on a CPU with these instructions (from :func:`cpu_instructions`).

    Without a dot-product instruction x86 runtimes multiply u8 × s8 pairs into 16 bits, which
    saturate when weights use all of −128 … 127.
    """
    have = [name for name in instructions if name in _DOT_PRODUCTS]
    if have:
        return f"int8 runs on {have[0]}: sums of products are exact"
    if saturates_int8_pairs(instructions):
        return (
            "no VNNI: pairs of u8×s8 products saturate at 16 bits. Slimkit keeps them smaller on "
            "this processor (targets onnxruntime, onnxruntime-avx2); int8 files of other makers, "
            "or made elsewhere, may give wrong results here. int8 gains less speed than with VNNI"
        )
    return "no int8 dot-product instruction was found: measure before relying on int8"


def saturates_int8_pairs(instructions: list[str] | None = None) -> bool:
    """Whether sums of two u8 × s8 products saturate at 16 bits here.

    Args:
        instructions: as from :func:`cpu_instructions`, this CPU's by default.
    """
    names = cpu_instructions() if instructions is None else instructions
    x86 = any(name.startswith("AVX") for name in names)
    return x86 and not any(name in _DOT_PRODUCTS for name in names)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively, which is then about twice as fast as fp32.

    A CPU that does not may be a hundred times slower at it: torch then has no vector kernel for
    convolutions in bf16.
    """
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    ask = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch we take
    capabilities = ask() if ask is not None else {}
    return any(capabilities.get(name, False) for name in _BF16_INSTRUCTIONS)


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
