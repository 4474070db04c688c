"""`gptq`: the commands, and `main`, the only place that turns errors into exit codes.

    0  done                         3  refused by preflight: nothing was written
    1  failed, the traceback stays  4  out of memory on a device
    2  usage or configuration       5  a quality gate failed              130  interrupted
                                                                          141  the reader of stdout went away

Typer brings its own copy of Click. Its errors are recognised by their attributes, never by importing
either: a usage error has `format_message` and an `exit_code`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import zip_longest
from types import FrameType
from typing import Annotated, Any, TextIO, cast

import typer
import typer.core

from gptq_cli import __version__
from gptq_cli.cli import about, failure, ranks
from gptq_cli.cli.environment import unread_variables
from gptq_cli.cli.inspect_map import inspect_map
from gptq_cli.cli.load import load
from gptq_cli.cli.output import LineSink, Output, OutputLostError, Session, Unbreakable
from gptq_cli.cli.push import push
from gptq_cli.cli.quantize import quantize
from gptq_cli.cli.report import report
from gptq_cli.devices.out_of_memory import out_of_memory_told
from gptq_cli.display.escapes import environment_that_fits, fit_encoding
from gptq_cli.display.jsonl import JsonlDisplay
from gptq_cli.errors import GptqError

EPILOG = (
    "Every option is also an environment variable: --group-size is GPTQ_GROUP_SIZE. "
    "Results go to stdout, progress to stderr. "
    "Exit codes: 0 done, 1 failed, 2 usage, 3 refused by preflight, 4 out of memory, 5 quality gate, "
    "130 interrupted."
)

_LESS = "free memory on this machine, or raise the limit that this process has (ulimit -v, its container's)"


_WATCHED = ("quantize", "load", "inspect-map", "push")
"""Commands that have --progress."""


class _Command(typer.core.TyperCommand):
    """A command whose help page shows no `<bool>` behind a flag, those of Typer included, at any width."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with environment_that_fits():
            super().format_help(ctx, formatter)


class _Group(typer.core.TyperGroup):
    """The same for the program itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with environment_that_fits():
            super().format_help(ctx, formatter)


def _without_types(params: list[Any]) -> list[Any]:
    for one in params:
        if getattr(one, "is_flag", False):
            one.metavar = ""
    return params


app = typer.Typer(
    name="gptq",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    rich_markup_mode="rich",
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError, version

        found = []
        for name in ("torch", "transformers", "accelerate"):
            try:
                found.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                found.append(f"{name} missing")
        python = ".".join(str(part) for part in sys.version_info[:3])
        sys.stdout.write(f"gptq {__version__} (python {python}, {', '.join(found)})\n")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", metavar="", is_eager=True, callback=_version
        ),
    ] = False,
) -> None:
    """Quantize a Hugging Face causal language model to a GPTQ checkpoint that real servers load."""


for name, function in (
    ("quantize", quantize),
    ("load", load),
    ("inspect-map", inspect_map),
    ("push", push),
    ("report", report),
    ("doctor", about.doctor),
    ("rules", about.rules),
    ("targets", about.targets),
    ("recipes", about.recipes),
):
    app.command(name, cls=_Command, epilog=EPILOG)(function)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv`: the words after the program's name."""
    words = tuple(sys.argv[1:] if argv is None else argv)
    session = Session(argv=words, as_json="--json" in words or _is_on("GPTQ_JSON", os.environ))
    for stream in (sys.stdout, sys.stderr):
        fit_encoding(stream)  # a character that the terminal cannot show is not an error
    with ExitStack() as stack:
        output = Output(sys.stdout) if sys.stdout is not None else None
        if output is not None:
            stack.enter_context(redirect_stdout(cast(TextIO, output)))
        if sys.stderr is not None:
            stack.enter_context(redirect_stderr(cast(TextIO, Unbreakable(sys.stderr))))
        if ranks.follows(os.environ, words):
            return ranks.followed(session, _ended)
        code = _ended(session)
        if output is None:
            return ranks.left(session, code)
        with suppress(OutputLostError):
            output.flush()
        failure.report_lost_output(output)
        if output.reader_gone and code in (0, 1):
            return failure.READER_GONE
        return ranks.left(session, code if output.failure is None else code or 1)


def _ended(session: Session) -> int:
    """Run the command; report how it ended and return the exit code for that."""
    if sys.stderr is not None and _asks_for_json_lines(session.argv, os.environ):
        session.json_lines = JsonlDisplay(sys.stderr)  # for errors before the work; `watch` makes its own
    ended: BaseException = KeyboardInterrupt()
    try:
        with _signals_interrupt(session), out_of_memory_told(lambda: "outside of the work", _LESS):
            code = _run(session)
        if code != failure.INTERRUPTED:
            return code
    except SystemExit as stop:  # Typer's, where the reader of stdout went away and after --show-completion
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except OutputLostError:
        return 1
    except BaseException as error:  # noqa: BLE001  # the one place that may: the error is written out below
        ended = error
    ranks.tell_launcher(os.environ, failure.summary(ended, session.interrupted)[1])
    with ExitStack() as stack:
        if session.json_lines is not None:  # stderr holds JSON lines alone, the error included
            stack.callback(session.json_lines.failed, *failure.summary(ended, session.interrupted))
            sink = LineSink(session.json_lines.log)
            stack.callback(sink.finish)
            stack.enter_context(redirect_stderr(cast(TextIO, sink)))
        return _reported(ended, session)


def _reported(error: BaseException, session: Session) -> int:
    """Write an error out for people, and for programs where they asked; its exit code."""
    if isinstance(error, GptqError):
        as_json = session.as_json and not session.documented
        return failure.report_known(error, session.seen, as_json=as_json, quiet=session.quiet)
    if isinstance(error, KeyboardInterrupt):
        return failure.report_interrupted(session.interrupted, as_json=session.as_json)
    if not isinstance(error, Exception):
        raise error
    message = getattr(error, "format_message", None)
    if message is not None:
        code = int(getattr(error, "exit_code", 2))
        command = next((word for word in session.argv[:1] if not word.startswith("-")), "")
        return failure.report_usage(error, message(), code, command=command, as_json=session.as_json)
    return failure.report_unknown(error, as_json=session.as_json)


def _is_on(variable: str, environ: Mapping[str, str]) -> bool:
    """A variable as Typer reads that of a flag, for errors before it is parsed."""
    return environ.get(variable, "").strip().lower() in ("1", "true", "t", "yes", "y", "on")


def _asks_for_json_lines(words: Sequence[str], environ: Mapping[str, str]) -> bool:
    """`--progress jsonl`, however it is given, for errors before it is parsed."""
    if "--quiet" in words or _is_on("GPTQ_QUIET", environ):
        return False
    asked = environ.get("GPTQ_PROGRESS", "") if words and words[0] in _WATCHED else ""
    for word, after in zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if name == "--progress":
            asked = value if equals else after
    return asked == "jsonl"


def _run(session: Session) -> int:
    command = typer.main.get_command(app)
    session.warned = tuple(unread_variables(command, os.environ))
    result = command.main(args=list(session.argv), prog_name="gptq", standalone_mode=False, obj=session)
    return result if isinstance(result, int) else 0


def _end_at_once() -> None:
    """Exit 130 without another step, with the terminal's cursor shown."""
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        os.write(sys.__stderr__.fileno(), b"\x1b[?25h\n")
    os._exit(failure.INTERRUPTED)


@contextmanager
def _signals_interrupt(session: Session) -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does, so that every `finally` runs. nohup is respected.

    A second signal ends the process at once: what is finished is on the disk already. Once the result is in
    place, what is left to do (a table, a page) is not interrupted.
    """

    heard: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if session.done:
            return
        if heard:
            _end_at_once()
        heard.append(number)
        raise KeyboardInterrupt

    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in usual:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
