"""The command line. One module per command, imported when it is asked for."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import InputError

#: In the order of ``adsc --help``. Each is a module with an ``EXAMPLE`` and a function ``command``, which prints for
#: people unless ``as_json``, and returns what ``--json`` prints.
COMMANDS = ("demo", "run", "cost", "train", "env")


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f".{cmd_name}", __name__)
        single = typer.Typer(add_completion=False)
        single.command(cmd_name, epilog=f"Example: {module.EXAMPLE}")(_guarded(module.command))
        return typer.main.get_command(single)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Example: adsc demo",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"adsc {__version__}")
        raise typer.Exit


@app.callback()
def _adsc(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make any multimodal LLM cheaper: reduce its vision tokens inside the language model."""


def _guarded(command: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Print what a command returns for ``--json``, and end on one line in place of a traceback.

    The status is 2 for bad input, 130 for Ctrl-C, 1 for anything unexpected.
    """

    @functools.wraps(command)
    def guarded(*, as_json: bool, debug: bool, **options: Any) -> None:
        try:
            if as_json:  # nothing else may reach standard output, whatever a library prints
                with contextlib.redirect_stdout(sys.stderr):
                    report = command(as_json=True, debug=debug, **options)
                print(json.dumps(report))
            else:
                command(as_json=False, debug=debug, **options)
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            if debug:
                raise
            if isinstance(error, InputError):
                _say(f"error: {error}")
                raise typer.Exit(2) from None
            _say(f"error: {type(error).__name__}: {error} (unexpected; --debug shows the traceback)")
            raise typer.Exit(1) from None

    return guarded


def _say(text: str) -> None:
    typer.secho(" ".join(text.split()), fg="red", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``adsc``; raises SystemExit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without ✓ or █ gets a question mark
            stream.reconfigure(errors="replace")
    app(arguments, prog_name="adsc")
