"""An error as a person reads it on stderr, and as a program reads it on stdout with `--json`.

error: bits is 5; allowed: 2, 3, 4, 8
  hint: use --bits 4, which every server reads

Names, paths and messages of libraries in it pass `display.escapes`: an error is one line, whatever they hold.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Collection, Sequence
from contextlib import suppress

from gptq_cli.cli.output import Output, OutputLostError, write_document
from gptq_cli.cli.usage import usage_words
from gptq_cli.display.escapes import console_for, escaped, many_lines, one_line
from gptq_cli.display.jsonl import JsonlDisplay
from gptq_cli.errors import DeviceMapError, GptqError, Interrupted, PreflightRefused
from gptq_cli.events import FindingRaised
from gptq_cli.files import reason
from gptq_cli.findings import Finding
from gptq_cli.results.document import Json, document
from gptq_cli.results.failure import FailureFacts, FailureReport

INTERRUPTED = 130
READER_GONE = 141
"""What a shell reports of a program that SIGPIPE ended, as in `gptq … | head -1`."""


def summary(error: BaseException, interrupted: Interrupted | None) -> tuple[str, str]:
    """Kind and message of what ended a command, for the last line of an event stream."""
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted", interrupted.message if interrupted is not None else "interrupted"
    return type(error).__name__, str(getattr(error, "message", "") or error or type(error).__name__)


def error_document(error: BaseException, exit_code: int) -> dict[str, Json]:
    """What `--json` writes in place of a result."""
    return _document(
        type(error).__name__,
        error.message if isinstance(error, GptqError) else str(error),
        getattr(error, "hint", None),
        exit_code,
        error.report.ordered() if isinstance(error, PreflightRefused) else None,
    )


def _document(
    kind: str, message: str, hint: str | None, exit_code: int, findings: tuple[Finding, ...] | None = None
) -> dict[str, Json]:
    facts = FailureFacts(type=kind, message=message, hint=hint, exit_code=exit_code, findings=findings)
    return document(FailureReport(error=facts))


def _write_document(body: dict[str, Json]) -> None:
    """The document of an error. A lost stdout is reported by `main`; the exit code stays the error's."""
    with suppress(OutputLostError):
        write_document(body)


def report_known(error: GptqError, seen: Collection[Finding], *, as_json: bool, quiet: bool) -> int:
    """An error raised on purpose: message and hint. Returns its exit code. `quiet`: no warnings, no notes."""
    if isinstance(error, PreflightRefused):
        unseen = [finding for finding in error.report.ordered() if finding not in seen]
        _write_findings([finding for finding in unseen if finding.level == "error" or not quiet])
    message, excerpt = _split(error)
    _write_error(message, error.hint, excerpt)
    if as_json:
        _write_document(error_document(error, error.exit_code))
    return error.exit_code


def report_refused(findings: Sequence[Finding], json_lines: JsonlDisplay | None) -> None:
    """Why a plan is refused, which its result says as well: on stderr for whoever does not see that.
    `json_lines`: what writes stderr where it holds JSON lines alone."""
    errors = [finding for finding in findings if finding.level == "error"]
    if json_lines is not None:
        for finding in errors:
            json_lines(FindingRaised(finding))
        return
    streams = (sys.stdout, sys.stderr)
    if not all(stream is not None and stream.isatty() for stream in streams):
        _write_findings(errors)


def report_unknown(error: Exception, *, as_json: bool) -> int:
    """Any other error is a defect or the environment: with its traceback."""
    if sys.stderr is not None:
        sys.stderr.write(many_lines("".join(traceback.format_exception(error))))
    _write_error(
        f"unexpected {type(error).__name__}: {error}",
        "the traceback above says where; it belongs in a bug report",
    )
    if as_json:
        _write_document(error_document(error, 1))
    return 1


def report_usage(error: Exception, message: str, exit_code: int, *, command: str, as_json: bool) -> int:
    """A usage error of Typer, in our words. `command`: the first word of the command line."""
    if not message:  # no arguments at all: Typer has shown the help page
        return exit_code
    message, hint = usage_words(error, message, command)
    _write_error(message, hint)
    if as_json:
        _write_document(_document("UsageError", message, hint, exit_code))
    return exit_code


def report_interrupted(error: Interrupted | None, *, as_json: bool) -> int:
    """SIGINT or SIGTERM: one line, and how to go on where finished work was kept."""
    message, hint = (error.message, error.hint) if error is not None else ("interrupted", None)
    _write(message)
    if hint:
        _write(f"  hint: {hint}")
    if as_json:
        _write_document(_document("Interrupted", message, hint, INTERRUPTED))
    return INTERRUPTED


def report_lost_output(output: Output) -> None:
    """Standard output could not be written: one line, unless its reader closed it."""
    if output.failure is not None and not output.reader_gone:
        why = reason(output.failure) if isinstance(output.failure, (OSError, ValueError)) else ""
        _write_error(
            f"standard output cannot be written: {why}",
            "make room or send it elsewhere; files that were written are complete",
        )


def _write_error(message: str, hint: str | None, excerpt: Sequence[str] = ()) -> None:
    _write(f"error: {message}")
    for line in excerpt:
        _write(line)
    if hint:
        _write(f"  hint: {hint}")


def _split(error: GptqError) -> tuple[str, list[str]]:
    """The message, and the two lines below it that point into a device map, as `syntax_error` makes them."""
    if not isinstance(error, DeviceMapError) or error.position is None or error.message.count("\n") < 2:
        return error.message, []
    message, *excerpt = error.message.rsplit("\n", 2)
    return message, excerpt


def _write(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{one_line(line)}\n")
        sys.stderr.flush()


def _write_findings(findings: list[Finding]) -> None:
    """A table at a terminal; elsewhere one line per statement, so that no path is broken at a column."""
    if not findings or sys.stderr is None:
        return
    from gptq_cli.display.tables import findings_table

    findings = escaped(findings)
    console = console_for(sys.stderr)
    if console.is_terminal:
        console.print(findings_table(findings))
        return
    for line in (line for finding in findings for line in finding.lines):
        _write(line)
