"""The steps of each command on one screen: open, check, work, report.

A job comes in as frozen data, events go out through the observer, a report comes back.
"""

from gptq_cli.jobs.inspecting import inspect_map
from gptq_cli.jobs.loading import load, open_model
from gptq_cli.jobs.quantizing import dry_run, quantize
from gptq_cli.jobs.trial import trial

__all__ = ["dry_run", "inspect_map", "load", "open_model", "quantize", "trial"]
