"""A report like one that a run leaves behind, small enough to read."""

from __future__ import annotations

from typing import Any

import pytest


def _latency(median: float, openvino: float) -> list[dict[str, Any]]:
    return [
        {"backend": "onnxruntime", "threads": 1, "batch": 1, "median_ms": median,
         "p90_ms": 1.04 * median, "busy": None},
        {"backend": "openvino", "threads": 1, "batch": 1, "median_ms": openvino,
         "p90_ms": 1.04 * openvino, "busy": None},
    ]  # fmt: skip


def _epochs(number: int, start: float, end: float) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "loss": 2.2 * 0.75**epoch + 0.05,
            "lr": 0.1 * (1 - epoch / number),
            "seconds": 1.9,
            "images_per_second": 1810.0,
            "metrics": {"accuracy": end - (end - start) * 0.6**epoch, "loss": 0.1},
        }
        for epoch in range(number)
    ]


def _train(epochs: int = 12) -> dict[str, Any]:
    return {
        "name": "train",
        "type": "train",
        "seconds": 28.4,
        "cached": True,
        "settings": {"epochs": epochs, "lr": 0.1, "teacher": None, "distill": []},
        "history": _epochs(epochs, 81.0, 99.1),
    }


def _prune() -> dict[str, Any]:
    layers = ["conv1"] + [
        f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)
    ]
    kept = [12, 8, 16, 8, 16, 24, 16, 32, 40, 24]
    totals = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    channels = [
        {"layer": layer, "kept": k, "total": t}
        for layer, k, t in zip(layers, kept, totals, strict=True)
    ]
    return {
        "name": "prune",
        "type": "prune",
        "seconds": 0.6,
        "cached": False,
        "settings": {"macs": 0.6, "criterion": "l2", "allocation": "global", "ignore": ["fc"]},
        "channels": channels,
    }


def _tune(name: str, kind: str, epochs: int) -> dict[str, Any]:
    return {
        "name": name,
        "type": kind,
        "seconds": 11.2,
        "cached": False,
        "settings": {
            "epochs": epochs,
            "teacher": "train",
            "distill": [{"type": "kd", "temperature": 4.0, "weight": 1.0}],
        },
        "history": _epochs(epochs, 93.0, 98.9),
    }


def _variant(
    name: str,
    accuracy: float,
    cost: tuple[int, int, int, int, int],
    latency: list[dict[str, Any]],
    stages: list[dict[str, Any]],
    parity: dict[str, Any],
    integer: bool = False,
) -> dict[str, Any]:
    params, macs, bops, weight_bytes, size = cost
    done = {"convs": 21, "linears": 1, "adds": 9}
    fusion = {f"integer_{kind}": number if integer else 0 for kind, number in done.items()}
    return {
        "name": name,
        "metrics": {"accuracy": accuracy, "loss": 0.06},
        "torch_metrics": {"accuracy": accuracy},
        "cost": {
            "params": params,
            "nonzero_params": params,
            "macs": macs,
            "bops": bops,
            "weight_bytes": weight_bytes,
            "bytes": size,
        },
        "latency": latency,
        "parity": parity,
        "fusion": {**done, **fusion, "float_nodes": []},
        "files": {"onnx": f"variants/{name}/model.onnx", "model": f"variants/{name}/model"},
        "stages": stages,
    }


def _example() -> dict[str, Any]:
    """Three variants of a small residual network, two backends, three gates."""
    exact = {"max_abs_diff": 3.1e-6, "sqnr_db": 121.0, "top1_agreement": 1.0, "samples": 540}
    close = {"max_abs_diff": 0.42, "sqnr_db": 38.2, "top1_agreement": 0.9981, "samples": 540}
    return {
        "schema_version": 1,
        "name": "quickstart",
        "seed": 0,
        "smoke": False,
        "data": {
            "source": "digits", "shape": [1, 32, 32], "train": 1132, "validation": 125,
            "test": 540, "classes": list("0123456789"), "skipped": {},
        },
        "environment": {
            "slimkit": "0.1.0",
            "python": "3.11.7",
            "torch": "2.14.1",
            "cpu": {"name": "Xeon", "cores": 2, "flags": ["avx512", "vnni"]},
        },
        "variants": [
            _variant(
                "baseline", 99.07, (272_186, 40_550_000, 41_523_000_000, 1_088_744, 1_103_214),
                _latency(1.212, 1.304), [_train()], exact,
            ),
            _variant(
                "pruned", 98.7, (94_010, 15_910_000, 16_291_000_000, 376_040, 391_004),
                _latency(0.634, 0.701), [_train(), _prune(), _tune("recover", "train", 6)], exact,
            ),
            _variant(
                "final", 98.89, (94_010, 15_910_000, 1_018_000_000, 94_900, 118_731),
                _latency(0.382, 0.290),
                [_train(), _prune(), _tune("recover", "train", 6), _tune("int8", "qat", 2)],
                close, integer=True,
            ),
        ],
        "gates": [
            {"name": "accuracy_drop", "limit": 1.0, "value": 0.18, "passed": True},
            {"name": "bytes_ratio", "limit": 0.15, "value": 0.1076, "passed": True},
            {"name": "latency_ratio", "limit": 0.5, "value": 0.315, "passed": True},
        ],
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    """The example, to change as a test likes."""
    return _example()


@pytest.fixture
def quick(report: dict[str, Any]) -> dict[str, Any]:
    """The example without training curves, whose drawing takes most of the time."""
    for variant in report["variants"]:
        for stage in variant["stages"]:
            stage.pop("history", None)
    return report


@pytest.fixture(scope="session")
def html() -> str:
    """The example's page."""
    from slimkit.report import build_html

    return build_html(_example())
