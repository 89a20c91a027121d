"""What the three commands have in common: did-you-mean, errors with exit codes, signals, config options."""

import difflib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import click

from shared import __version__
from shared.config import Settings, load_settings, settings_yaml
from shared.errors import INTERRUPTED_EXIT_CODE, LogitferryError

S = TypeVar("S", bound=Settings)
F = TypeVar("F", bound=Callable[..., Any])


class SuggestingGroup(click.Group):
    """A group that answers a mistyped verb with the nearest one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"no verb {args[0]!r}; {hint}", ctx) from None


def command_group(name: str, summary: str) -> Callable[[Callable[..., Any]], click.Group]:
    """Decorator for the group of one command, with --version."""

    def decorate(function: Callable[..., Any]) -> click.Group:
        group = click.group(name, cls=SuggestingGroup, help=summary, no_args_is_help=True)(function)
        return click.version_option(__version__, prog_name=name)(group)

    return decorate


overrides_option = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=C", help="Override one setting; repeatable."
)


def config_options(function: F) -> F:
    """CONFIG, --set a.b=c and --print-config."""
    for option in (
        click.option("--print-config", is_flag=True, help="Print the effective config and stop."),
        overrides_option,
        click.argument("config", type=click.Path()),
    ):
        function = option(function)
    return function


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


def read_config(kind: type[S], config: str, overrides: tuple[str, ...], *, print_config: bool) -> S:
    """The checked settings; with `print_config` they are printed and the command ends."""
    settings = load_settings(kind, config, overrides)
    if print_config:
        click.echo(settings_yaml(settings), nl=False)
        raise click.exceptions.Exit(0)
    return settings


def emit(result: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    """A verb's answer: one JSON object for programs, or lines for people."""
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(lines))


def run_command(group: click.Command) -> None:
    """Run a command and leave the process with the exit code of what happened."""
    try:
        with _sigterm_interrupts(), _log_on_stderr():
            code = group.main(standalone_mode=False)
    except click.exceptions.Exit as end:
        code = end.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except LogitferryError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted\n  next: run the same command again", err=True)
        code = INTERRUPTED_EXIT_CODE
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stdout = None
        code = 1
    except ModuleNotFoundError as error:
        click.echo(f"error: {error}\n  next: pip install 'logitferry[torch]'", err=True)
        code = 2
    except (MemoryError, OSError) as error:
        click.echo(f"error: {type(error).__name__}: {error}", err=True)
        code = 1
    except Exception as error:
        # A mistake of ours or of a library.  The traceback helps whoever mends it, not whoever meets it.
        if os.environ.get("LOGITFERRY_TRACEBACK"):
            raise
        click.echo(f"error: {type(error).__name__}: {error}", err=True)
        click.echo("  next: run again with LOGITFERRY_TRACEBACK=1 and report what it prints", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, does what Ctrl-C does."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _EchoHandler(logging.Handler):
    """Looks up standard error for each line, so that a progress bar can keep out of its way."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Shows what the toolkit has to say while it works."""
    logger, handler = logging.getLogger("logitferry"), _EchoHandler()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
