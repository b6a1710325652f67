"""What the command line prints errors on, and how an error becomes an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from slimkit.errors import SlimkitError
from slimkit.terminal import visible

__all__ = ["errors", "exit_code_of", "note", "output"]


class SafeConsole(Console):
    """A console whose texts hold no commands to the terminal: names come from files of others."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of ``renderable``, with control characters shown."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(visible(text), style)


output = SafeConsole(highlight=False, soft_wrap=True)
errors = SafeConsole(stderr=True, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """Say something that is no error and no result."""
    errors.print(Text(message, style="yellow"))


INTERRUPTED = 130
BAD_INPUT = 2
# Typer brings its own copy of click or uses the installed one: ask it for the class
CLICK_ERROR: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def exit_code_of(command: Callable[[], object]) -> int:
    """Run ``command``; print what went wrong in red, without a traceback, and return the code."""
    returned: object
    try:
        returned = command()
    except SlimkitError as error:
        errors.print(Text(f"error: {error}", style="red"))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        returned = INTERRUPTED
    except CLICK_ERROR as error:
        errors.print(Text(f"error: {_click_text(error)}", style="red"))
        return BAD_INPUT
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if returned == INTERRUPTED:  # typer may turn Ctrl-C into this code by itself
        text = "stopped; what is finished is kept, the same command goes on from here"
        errors.print(Text(text, style="yellow"))
    return returned if isinstance(returned, int) else 0


def _click_text(error: object) -> str:
    message = str(getattr(error, "format_message", lambda: error)())
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    return f"{message.rstrip('.')} (see {context.command_path} --help)"
