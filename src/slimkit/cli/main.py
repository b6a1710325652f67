"""The entry point: verbs, exit codes, and errors in one line.

Exit codes: 0, 1 (a gate of the recipe failed), 2 (bad input), 130 (Ctrl-C).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from slimkit.cli.console import errors, exit_code_of
from slimkit.cli.verbs import VERBS, register

__all__ = ["app", "main"]

app = typer.Typer(
    name="slimkit",
    help="Makes trained PyTorch networks smaller and faster, and proves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from slimkit import __version__

        typer.echo(f"slimkit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _verb in VERBS:
    register(app, _verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; ``sys.argv`` by default.

    Returns:
        The exit code. Called as the console script it also exits with it.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # so that `my_module:factory` in the current folder is found
    code = exit_code_of(lambda: app(given, standalone_mode=False))
    errors.file.flush()
    if arguments is None:
        sys.exit(code)
    return code


if __name__ == "__main__":
    main()
