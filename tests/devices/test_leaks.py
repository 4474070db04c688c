"""The leak check reports once per device, after several growths in a row."""

from __future__ import annotations

from gptq_cli.devices.leaks import BLOCKS_IN_A_ROW, LeakWatch
from gptq_cli.events import DeviceMemory

MIB = 1 << 20


def reading(mib: float, device: str = "cuda:0") -> tuple[DeviceMemory, ...]:
    size = int(mib * MIB)
    return (
        DeviceMemory(
            device=device, allocated_bytes=size, reserved_bytes=size, peak_bytes=size, total_bytes=1 << 40
        ),
    )


def said(values: list[float], device: str = "cuda:0") -> list[str]:
    watch = LeakWatch()
    return [text for value in values for text in watch.check(reading(value, device))]


def test_steady_growth_is_named_once() -> None:
    (text,) = said([100 + 8 * i for i in range(BLOCKS_IN_A_ROW + 6)])
    assert text == "memory of cuda:0 grows by 8.0 MiB per block, 4 blocks in a row; 132.0 MiB are in use now"


def test_what_goes_up_and_down_is_no_leak() -> None:
    assert said([100, 110, 120, 130, 90, 100, 110, 120, 90]) == []


def test_a_level_memory_is_no_leak() -> None:
    assert said([100.0] * 30) == []
    assert said([100 + 0.01 * i for i in range(30)]) == []


def test_the_resident_set_is_not_checked() -> None:
    assert said([100 + 8 * i for i in range(30)], device="cpu") == []


def test_devices_are_checked_separately() -> None:
    watch = LeakWatch()
    texts = []
    for i in range(8):
        texts += watch.check((*reading(100 + 5 * i, "cuda:0"), *reading(100, "cuda:1")))
    assert len(texts) == 1
    assert "cuda:0" in texts[0]
