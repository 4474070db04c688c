"""The make-believe devices behave as a card does, as far as the other tests rely on it."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.fakecuda.devices import Devices

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("devices")]

MIB = 1 << 20


def test_they_are_seen_as_cuda(devices: Devices) -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == torch.accelerator.device_count() == devices.count == 2
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    devices.resize([1 << 30] * 3, capability=(7, 5))
    assert torch.cuda.device_count() == 3
    assert torch.cuda.get_device_capability(2) == (7, 5)
    assert torch.cuda.mem_get_info(2) == (1 << 30, 1 << 30)


def test_operators_give_what_the_cpu_gives_where_the_tensors_lie() -> None:
    x = torch.randn(5, 7)
    on_device = x.to("cuda:1")
    product = on_device @ on_device.t()
    assert product.device == torch.device("cuda:1")
    assert torch.equal(product.cpu(), x @ x.t())
    on_device[:, 1] = 0
    assert torch.equal(on_device.cpu()[:, 1], torch.zeros(5))
    assert not torch.equal(on_device.cpu(), x)


def test_tensors_of_two_devices_never_meet() -> None:
    here, there, host = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1"), torch.ones(3)
    for other in (there, host):
        with pytest.raises(RuntimeError, match="same device"):
            torch.add(here, other)
    # a scalar may come from the CPU
    assert torch.equal((here + torch.tensor(1.0)).cpu(), torch.full((3,), 2.0))
    assert here[torch.tensor([0, 2])].device == torch.device("cuda:0")  # and so may indexes


def test_memory_is_counted_cached_and_refused(devices: Devices) -> None:
    held = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda:1")
    assert torch.cuda.memory_allocated(1) == torch.cuda.max_memory_allocated(1) == 8 * MIB
    del held
    assert torch.cuda.memory_allocated(1) == 0
    assert torch.cuda.memory_reserved(1) == 8 * MIB
    flushes = devices.flushes
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(1) == 0
    assert devices.flushes == flushes + 1
    assert torch.cuda.max_memory_allocated(1) == 8 * MIB
    torch.cuda.reset_peak_memory_stats(1)
    assert torch.cuda.max_memory_allocated(1) == 0
    assert torch.cuda.memory_allocated(0) == torch.cuda.max_memory_allocated(0) == 0

    ooms = devices.ooms(1)
    devices.squeeze(1, MIB)
    kept = torch.empty(MIB, dtype=torch.uint8, device="cuda:1")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(1, device="cuda:1")
    assert devices.ooms(1) == ooms + 1
    devices.relax()
    assert torch.empty(1, device="cuda:1").device == kept.device


def test_a_fraction_limits_what_is_given_and_not_what_is_said(devices: Devices) -> None:
    torch.cuda.set_per_process_memory_fraction(0.001, 0)
    assert torch.cuda.mem_get_info(0)[1] == torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(16 * MIB, dtype=torch.uint8, device="cuda:0")
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_every_thread_has_a_current_device_and_starts_on_the_first() -> None:
    seen: list[int] = []
    with torch.accelerator.device_index(1):
        assert torch.empty(1, device="cuda").device == torch.device("cuda:1")
        other = threading.Thread(target=lambda: seen.append(torch.accelerator.current_device_index()))
        other.start()
        other.join()
    assert seen == [0]


def test_random_numbers_come_from_the_generator_of_the_device() -> None:
    host = torch.get_rng_state()
    torch.cuda.manual_seed_all(3)
    first = torch.rand(4, device="cuda:1")
    torch.cuda.manual_seed_all(3)
    assert torch.equal(torch.rand(4, device="cuda:1"), first)
    assert not torch.equal(torch.rand(4, device="cuda:1"), first)
    assert torch.equal(torch.get_rng_state(), host)
