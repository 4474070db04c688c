"""The make-believe devices, as they are at the start of each test: two of the same size, all free."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.commands import write_text
from tests.fakecuda.devices import Devices, installed

DEVICE_BYTES = 4 << 30


@pytest.fixture
def devices() -> Iterator[Devices]:
    """Held from outside. Nothing is on them when a test begins, and nothing when it has ended."""
    import torch

    found = installed()
    if found is None:
        pytest.skip("needs the make-believe CUDA: make test-fake")
    found.resize([DEVICE_BYTES, DEVICE_BYTES])
    gc.collect()
    found.relax()
    assert [torch.cuda.memory_allocated(index) for index in range(2)] == [0, 0]
    torch.cuda.reset_peak_memory_stats(0)
    torch.cuda.reset_peak_memory_stats(1)
    yield found
    found.relax()
    assert torch.accelerator.current_device_index() == 0


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")
