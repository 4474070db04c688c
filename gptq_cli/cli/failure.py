"""An error as a person reads it on stderr, and as a program reads it on stdout with `--json`.

error: bits is 5; allowed: 2, 3, 4, 8
  hint: use --bits 4, which every server reads
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Collection

from gptq_cli.cli.output import write_document
from gptq_cli.errors import GptqError, PreflightRefused
from gptq_cli.findings import Finding
from gptq_cli.results import SCHEMA_VERSION, Json, to_json

INTERRUPTED = 130


def error_document(error: BaseException, exit_code: int) -> dict[str, Json]:
    """What `--json` writes in place of a result."""
    body: dict[str, Json] = {
        "type": type(error).__name__,
        "message": _message(error),
        "hint": getattr(error, "hint", None),
        "exit_code": exit_code,
    }
    if isinstance(error, PreflightRefused):
        body["findings"] = to_json(error.report.ordered())
    return {"schema_version": SCHEMA_VERSION, "error": body}


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, GptqError) else str(error)


def report_known(error: GptqError, seen: Collection[Finding], *, as_json: bool, quiet: bool = False) -> int:
    """An error that we raise on purpose: message and hint. Returns its exit code. `quiet`: errors alone."""
    if isinstance(error, PreflightRefused):
        unseen = [finding for finding in error.report.ordered() if finding not in seen]
        _write_findings([finding for finding in unseen if finding.level == "error" or not quiet])
    _write_error(error.message, error.hint)
    if as_json:
        write_document(error_document(error, error.exit_code))
    return error.exit_code


def report_unknown(error: Exception, *, as_json: bool) -> int:
    """Anything else is a defect or the environment: the traceback stays."""
    traceback.print_exception(error, file=sys.stderr)
    _write_error(
        f"unexpected {type(error).__name__}: {error}",
        "the traceback above says where; it belongs in a bug report",
    )
    if as_json:
        write_document(error_document(error, 1))
    return 1


def report_usage(error: Exception, message: str, exit_code: int, *, as_json: bool) -> int:
    """A usage error of Typer, in our words."""
    if not message:  # no arguments at all: Typer has shown the help page
        return exit_code
    message = message[0].lower() + message[1:].rstrip(".")
    variable = getattr(getattr(error, "param", None), "envvar", None)
    if isinstance(variable, str) and variable in os.environ:
        message += f" ({variable} is {os.environ[variable]!r} in the environment)"
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context is not None else "gptq --help"
    _write_error(message, hint)
    if as_json:
        body: dict[str, Json] = {
            "type": "UsageError",
            "message": message,
            "hint": hint,
            "exit_code": exit_code,
        }
        write_document({"schema_version": SCHEMA_VERSION, "error": body})
    return exit_code


def report_interrupted(*, as_json: bool) -> int:
    """SIGINT or SIGTERM: one line."""
    _write("interrupted")
    if as_json:
        body: dict[str, Json] = {"type": "Interrupted", "message": "interrupted", "exit_code": INTERRUPTED}
        write_document({"schema_version": SCHEMA_VERSION, "error": body})
    return INTERRUPTED


def _write_error(message: str, hint: str | None) -> None:
    _write(f"error: {message}")
    if hint:
        _write(f"  hint: {hint}")


def _write(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _write_findings(findings: list[Finding]) -> None:
    """A table at a terminal; elsewhere a line a statement, so that no path is broken at a column."""
    if not findings or sys.stderr is None:
        return
    from rich.console import Console

    from gptq_cli.display.plain import finding_lines
    from gptq_cli.display.tables import findings_table

    console = Console(file=sys.stderr, highlight=False)
    if console.is_terminal:
        console.print(findings_table(findings))
        return
    for line in (line for finding in findings for line in finding_lines(finding)):
        _write(line)
