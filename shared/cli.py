"""What the three commands have in common: did-you-mean, errors with exit codes, signals, config options."""

import difflib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click

from shared import __version__
from shared.amounts import seconds_of
from shared.config import Settings, load_settings, settings_yaml
from shared.errors import INTERRUPTED_EXIT_CODE, LogitferryError
from shared.masking import masked

S = TypeVar("S", bound=Settings)
F = TypeVar("F", bound=Callable[..., Any])


class SuggestingGroup(click.Group):
    """A group that answers a mistyped verb with the nearest one, and lists verbs in the order of their use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

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
        print_settings(settings)
    return settings


def print_settings(settings: Settings) -> NoReturn:
    """The effective config, and the end of the command."""
    click.echo(settings_yaml(settings), nl=False)
    raise click.exceptions.Exit(0)


def emit(result: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    """A verb's answer: one JSON object for programs, or lines for people."""
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(lines))


class _Duration(click.ParamType):
    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else seconds_of(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


stop_after_option = click.option(
    "--stop-after",
    "stop_after_s",
    type=_Duration(),
    help="Stop after 3h50m or the like, as if interrupted: exit code 75.",
)


def stop_after(seconds: float | None) -> None:
    """Interrupt this process in so many seconds; called while `run_command` runs a command."""
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)


class _Stop:
    """Turns signals into KeyboardInterrupt, and remembers which one came."""

    SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM", signal.SIGALRM: "out of time"}
    AGAIN_S = 10.0

    def __init__(self) -> None:
        self.said: str | None = None
        self._stopped_s = 0.0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Schedulers send SIGTERM more than once; only Ctrl-C breaks into what is still being put away."""
        if self.said is not None and number != signal.SIGINT and time.monotonic() - self._stopped_s < self.AGAIN_S:
            return
        self.said, self._stopped_s = self.SAID[signal.Signals(number)], time.monotonic()
        raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        previous = {number: signal.getsignal(number) for number in self.SAID}
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:  # as shells set it for what runs in the background
                signal.signal(number, self)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in previous.items():
                signal.signal(number, handler)


def run_command(group: click.Command) -> None:
    """Run a command and leave the process with the exit code of what happened."""
    stop = _Stop()
    try:
        with stop.listening(), _log_on_stderr():
            code = group.main(standalone_mode=False)
    except click.exceptions.Exit as end:
        code = end.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except LogitferryError as error:
        click.echo(f"error: {error if stop.said else error.told()}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED_EXIT_CODE
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stdout = None
        code = 1
    except ModuleNotFoundError as error:
        click.echo(f"error: {error}\n  next: pip install 'logitferry[torch]'", err=True)
        code = 2
    except (MemoryError, OSError) as error:
        said = masked(str(error))
        click.echo(f"error: {type(error).__name__}: {said}\n  next: {LogitferryError.usual_step}", err=True)
        code = 1
    except Exception as error:
        # A mistake of ours or of a library.  The traceback helps whoever mends it, not whoever meets it.
        if os.environ.get("LOGITFERRY_TRACEBACK"):
            raise
        click.echo(f"error: {type(error).__name__}: {masked(str(error))}", err=True)
        click.echo("  next: run again with LOGITFERRY_TRACEBACK=1 and report what it prints", err=True)
        code = 1
    code = code if isinstance(code, int) else 0
    if code and stop.said:  # also where a library's own processes were stopped first, and that is what was told
        code = INTERRUPTED_EXIT_CODE
    if code == INTERRUPTED_EXIT_CODE:
        click.echo(f"{stop.said or 'interrupted'}\n  next: run the same command again", err=True)
        # A signal that came within an exec of source, as dataclasses do, makes `python -m` leave with 130 whatever is
        # said here, unless another exec ends well.
        exec("")
    sys.exit(code)


class _EchoHandler(logging.Handler):
    """Looks up standard error for each line, so that a progress bar can keep out of its way."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Shows what the toolkit has to say while it works; what libraries log of their own, such as the signed URL that a
    failed upload went to, is cleaned of secrets."""
    logger, handler = logging.getLogger("logitferry"), _EchoHandler()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    factory = logging.getLogRecordFactory()

    def cleaned(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = factory(*arguments, **options)
        try:
            message = record.getMessage()
        except Exception:  # a library's slip, which logging itself tells, and only where somebody listens
            return record
        if message != (clean := masked(message)):
            record.msg, record.args = clean, None
        return record

    logging.setLogRecordFactory(cleaned)
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
