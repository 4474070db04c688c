"""`python -m pytest -p tests.fakecuda.plugin …`: the process believes that it has two CUDA devices.

As a plugin named on the command line it is imported before any conftest.py, and so before torch.
"""

from __future__ import annotations

from tests.fakecuda.devices import install

DEVICE_BYTES = 4 << 30
install([DEVICE_BYTES, DEVICE_BYTES])
