"""Claiming the output of a run before anything is read: a second run to the same place ends at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gptq_cli.checkpoint.destination import Destination
from gptq_cli.checkpoint.place import Place, check_destination
from gptq_cli.config import QuantizeJob
from gptq_cli.errors import ConfigError, DestinationBusy
from gptq_cli.events import Observer, Warned
from gptq_cli.findings import PreflightReport
from gptq_cli.preflight.facts import Claim
from gptq_cli.preflight.resolve import refusal
from gptq_cli.preflight.rules import output as rules_output


@contextmanager
def claimed(job: QuantizeJob, observer: Observer) -> Iterator[Claim]:
    """Hold the output for this run: before anything is read, so that a second run ends at once.

    Where it cannot be had because it is unsuitable, preflight says so among all else. Raises
    `PreflightRefused` while another run has it.
    """
    out = Path(job.out)

    def warn(message: str, hint: str) -> None:
        observer(Warned(message, hint))

    with ExitStack() as stack:
        destination: Destination | None = None
        failure = ""
        try:
            _check_unless_left_over(out, overwrite=job.overwrite)
            destination = stack.enter_context(Destination(out, overwrite=job.overwrite, warn=warn))
        except DestinationBusy as error:
            busy = rules_output.busy_finding(error.message, error.hint or "")
            raise refusal(PreflightReport((busy,))) from error
        except (ConfigError, ValueError):
            pass  # a rule of preflight finds the same, and reports it with all other findings
        except OSError as error:
            failure = f"{error.filename or out}: {error.strerror}"
        yield Claim(destination, failure)


def _check_unless_left_over(out: Path, *, overwrite: bool) -> None:
    """Raise `ConfigError` for an unsuitable output, unless an ended run left something to put in order."""
    try:
        check_destination(out, None, overwrite=overwrite)
    except ConfigError:
        if not Place.of(out).is_begun:
            raise
