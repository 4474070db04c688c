"""Quantize a Hugging Face causal language model to a GPTQ checkpoint that real servers load.

The package has six floors, and imports only go down. docs/architecture.md has the floors, the road of the
data and a list of all modules.
"""

from __future__ import annotations

__version__ = "0.2.0"

from gptq_cli.api import load, quantize

__all__ = ["__version__", "load", "quantize"]
