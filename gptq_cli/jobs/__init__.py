"""The steps of each command on one screen: open, check, work, report.

A job comes in as frozen data, events go out through the observer, a report comes back.
"""

from gptq_cli.jobs.inspect_map import inspect_map
from gptq_cli.jobs.load import load, open_model
from gptq_cli.jobs.quantize import dry_run, quantize

__all__ = ["dry_run", "inspect_map", "load", "open_model", "quantize"]
