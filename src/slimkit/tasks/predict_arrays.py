"""Run the model beside this file on arrays.

    python predict.py INPUTS.npz [INPUTS.npz …]

Needs numpy and onnxruntime only. A file holds one array for each input of the model, by its name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None, model: Path | None = None) -> None:
    """Command line; ``model`` is the file to run, by default the one beside this."""
    parser = argparse.ArgumentParser(prog="predict", description="Run a model on arrays.")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUTS.npz")
    chosen = parser.parse_args(arguments)
    file = str(model or Path(__file__).with_name("model.onnx"))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for path in chosen.inputs:
        with np.load(path) as given:
            outputs = session.run(None, {name: given[name] for name in names})
        for entry, output in zip(session.get_outputs(), outputs, strict=True):
            print(f"{path}: {entry.name} {json.dumps(output.tolist())}")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
