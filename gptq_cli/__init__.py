"""Quantize a Hugging Face causal language model to a GPTQ checkpoint that real servers load.

The package stands on five floors; imports only go down (ruff and tests/test_architecture.py prove it).

    4  cli/  display/  report/            parse and show
    3  jobs.py                            the story of each command
    2  engine/  inference/  preflight/    torch and the world
       model/  calibration/  devices/
    1  gptq/                              the maths, torch only
    0  config.py  device_map.py  placement.py  events.py  findings.py  results.py  errors.py

The road of the data: SPEC text -> DeviceMap -> Placement -> PreflightReport -> engine -> Event -> display,
and text -> TokenBatches -> hidden states -> Hessian -> codes, scales, zeros -> packed tensors -> checkpoint.
"""

__version__ = "0.1.0"
