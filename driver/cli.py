"""The command line: finds the command, and turns every failure into one line and a status."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from ..ir.errors import InfcError
from ..ir.extras import COMPILE, missing_library
from .stop_signals import raise_stop_signals, stop_was_handled, stopped_by
from .streams import settle_streams

# In the order of `infc --help`; a module is imported when its command, or its help, is asked for.
_COMMANDS = (
    "run",
    "compile",
    "rebuild",
    "generate",
    "chat",
    "serve",
    "batch",
    "inspect",
    "diff",
    "bench",
    "plan",
    "eval",
    "passes",
    "opt",
    "recipe",
    "cache",
    "doctor",
)
_INTERRUPTED = 128 + signal.SIGINT
_BROKEN_PIPE = 128 + signal.SIGPIPE
_MAX_LINE = 2000


class _Stopped(Exception):
    """Ctrl-C, or nobody reads the output any more; click would handle both in ways of its own."""

    def __init__(self, status: int) -> None:
        self.status = status


class _LazyGroup(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            result: object = super().invoke(ctx)
            sys.stdout.flush()
        except (KeyboardInterrupt, click.Abort):
            raise _Stopped(_INTERRUPTED) from None
        except BrokenPipeError:
            raise _Stopped(_BROKEN_PIPE) from None
        return result

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".commands.{cmd_name}", __package__)
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from ..ir.nearest import did_you_mean

        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            hint = did_you_mean(args[0], _COMMANDS, "see `infc --help`")
            raise click.UsageError(f"no command {args[0]!r} ({hint})")
        return super().resolve_command(ctx, args)


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from .. import __version__

        click.echo(f"infc {__version__}")
        ctx.exit()


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Print the version.",
)
def infc() -> None:
    """Compile and run large language models.

    \b
      infc run tiny "Write a class for a stack."
      infc run Qwen/Qwen2.5-0.5B-Instruct
      infc compile tiny -o tiny.infc
      infc serve tiny.infc
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status; prints at most one line for an error."""
    stop_was_handled()
    try:
        status = infc.main(arguments, prog_name="infc", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        return _fail("interrupted", _INTERRUPTED)  # before a command had begun
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else "")
        return 2
    except click.ClickException as error:
        return _fail(_click_text(error), error.exit_code)
    except _Stopped as stop:
        if stop.status == _INTERRUPTED:
            return _fail("interrupted", stop.status)
        # Whoever read the output has enough. Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return stop.status
    except Exception as error:
        if _debugging():
            raise
        return _fail(*_explain(error))


def main() -> NoReturn:
    """Runs the command line of this process, and ends it."""
    settle_streams()
    try:
        raise_stop_signals()
        status = run()
    except KeyboardInterrupt:
        status = _fail("interrupted", _INTERRUPTED)
    # There is nothing to clean up any more, and Python would print where it was.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # An interrupt that has passed through an exec of text, as libraries do it, is noted as not
    # handled, and CPython would end `python -m infc` by SIGINT. Another exec takes the note back.
    exec("")
    # What is left ends with the process: collecting it takes more than a second once torch is in.
    gc.freeze()
    sys.exit(status)


def _explain(error: Exception) -> tuple[str, int]:
    if (number := stopped_by()) is not None:
        return "interrupted" if number == signal.SIGINT else "terminated", 128 + number
    if isinstance(error, InfcError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name in COMPILE.libraries:
        missing = missing_library(error.name, "this command")
        return str(missing), missing.exit_code
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}", 1
    if isinstance(error, MemoryError):
        return "out of memory", 8
    kind = type(error).__name__
    return f"a fault in infc itself: {kind}: {error} (INFC_DEBUG=1 shows where)", 1


def _click_text(error: click.ClickException) -> str:
    text = error.format_message()
    return text[:1].lower() + text[1:]


def _fail(text: str, status: int) -> int:
    line = " ".join(text.split())
    if len(line) > _MAX_LINE:  # names of files and values may be of any length
        line = f"{line[: _MAX_LINE - 300]} ... {line[-300:]}"
    with contextlib.suppress(OSError):  # stderr may be full, or a pipe that nobody reads any more
        print(f"error: {line}", file=sys.stderr)
    return status


def _debugging() -> bool:
    return bool(os.environ.get("INFC_DEBUG"))
