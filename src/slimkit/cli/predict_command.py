"""``slimkit predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["predict_command"]


def predict_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx", help="An exported file.", show_default=False)
    ],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE…", help="Image files.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the images with what was found to here.")
    ] = None,
    score: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least score.", show_default="0.4")
    ] = None,
) -> None:
    """Say what a file finds in images; the same as predict.py beside a variant."""
    from slimkit.errors import DataError, InputError
    from slimkit.tasks import TASKS
    from slimkit.tasks.prediction import file_task

    task = TASKS.get(file_task(model), where=str(model)).model_validate({})
    for path in images:
        if not path.is_file():
            raise DataError("there is no such file", where=str(path))
    options = [str(path) for path in images]
    options += ["--out", str(out)] if out is not None else []
    options += ["--score", str(score)] if score is not None else []
    try:
        task.predict(model, options)
    except SystemExit as error:
        raise InputError(
            f"a file for {task.type} is not run like this", where=str(model)
        ) from error
