"""The make-believe devices, as they are at the start of each test: two of the same size, all free."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakecuda.devices import Devices, installed
from tests.fakecuda.runs import Quantized, Reference, quantize

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
def reference(tiny: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The checkpoint that the CPU alone makes of a tiny model, once for each set of options."""
    root = tmp_path_factory.mktemp("reference")
    made: dict[tuple[object, ...], Quantized] = {}

    def run(name: str, *options: object) -> Quantized:
        key = (name, *options)
        if key not in made:
            made[key] = quantize(tiny(name), root / str(len(made)), text, "--device-map", "cpu", *options)
            assert made[key].devices == ["cpu"]
        return made[key]

    return run
