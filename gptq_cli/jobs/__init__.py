"""The steps of each command on one screen: open, check, work, report.

A job comes in as frozen data, events go out through the observer, a report comes back. Torch is imported by
the first job that needs it, not by what only asks (`about`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptq_cli.jobs.inspecting import inspect_map
    from gptq_cli.jobs.loading import load, open_model
    from gptq_cli.jobs.quantizing import dry_run, quantize
    from gptq_cli.jobs.some_blocks import trial

__all__ = ["dry_run", "inspect_map", "load", "open_model", "quantize", "trial"]
_MODULES = {
    "dry_run": "quantizing",
    "inspect_map": "inspecting",
    "load": "loading",
    "open_model": "loading",
    "quantize": "quantizing",
    "trial": "some_blocks",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
