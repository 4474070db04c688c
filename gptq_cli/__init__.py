"""Quantize a Hugging Face causal language model to a GPTQ checkpoint that real servers load.

The package stands on six floors; imports only go down (ruff and tests/test_architecture.py check it).

    5  cli/  display/  report/                              parse and show
    4  jobs/  api                                           the steps of each command; gptq_cli.quantize, load
    3  preflight/  planning/                                may it be done, and how is it done best
    2  engine/  inference/  evaluation/  checkpoint/        torch and the world
       targets/  model/  calibration/  devices/
    1  gptq/                                                the maths, torch only
    0  placement/  results/  config  events  errors  ...    the vocabulary

The road of the data: SPEC text -> DeviceMap -> Placement -> PreflightReport -> engine -> Event -> display,
and text -> TokenBatches -> hidden states -> Hessian -> codes, scales, zeros -> packed tensors -> checkpoint.
"""

from __future__ import annotations

__version__ = "0.2.0"

from gptq_cli.api import load, quantize

__all__ = ["__version__", "load", "quantize"]
