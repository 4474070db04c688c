"""One device has one spelling, and sizes are bytes."""

from __future__ import annotations

import pytest
import torch

from gptq_cli.errors import DeviceMapError
from gptq_cli.placement.device import CPU, Device, format_size, parse_capacity, parse_size
from gptq_cli.placement.device_map import MaxMemory


@pytest.mark.parametrize(
    "value", [0, "0", "cuda:0", "cuda", torch.device("cuda:0"), torch.device("cuda"), " 0 "]
)
def test_one_device_whatever_it_is_called(value: object) -> None:
    assert Device.parse(value) == Device("cuda", 0)
    assert hash(Device.parse(value)) == hash(Device("cuda", 0))


@pytest.mark.parametrize("value", ["cpu", torch.device("cpu"), "cpu:0", torch.device("cpu:0"), CPU])
def test_cpu_is_cpu(value: object) -> None:
    assert Device.parse(value) == CPU
    assert str(Device.parse(value)) == "cpu"


def test_bare_index_means_the_accelerator_that_is_named() -> None:
    assert Device.parse(1, accelerator="xpu") == Device("xpu", 1)
    assert Device.parse("cuda:1", accelerator="xpu") == Device("cuda", 1)


@pytest.mark.parametrize(
    ("value", "said", "hint"),
    [
        ("gpu", "not a device", "write cuda"),
        ("gpu:1", "not a device", "write cuda:1"),
        ("CPU", "lower case", "write cpu"),
        ("CUDA:1", "not a device", "write cuda:1"),
        ("cuda:-1", "out of range", "count from 0"),
        ("-1", "negative", "count from 0"),
        (-1, "out of range", "count from 0"),
        (10**30, "out of range", "count from 0"),
        ("mps:1", "only one 'mps'", ""),
        ("coda", "not a device", "cuda:0"),
        ("", "not a device", "cuda:0"),
        (True, "not a device", "cuda:0"),
        (None, "not a device", "cuda:0"),
        (1.5, "not a device", "cuda:0"),
        ("cuda:99999", "out of range", "count from 0"),
        (torch.device("vulkan"), "not a kind of device", ""),
    ],
)
def test_no_device(value: object, said: str, hint: str) -> None:
    with pytest.raises(DeviceMapError) as caught:
        Device.parse(value)
    assert said in caught.value.message
    assert hint in (caught.value.hint or "")


def test_order_is_accelerators_by_index_then_cpu_then_disk() -> None:
    devices = [Device("disk"), CPU, Device("cuda", 10), Device("cuda", 2)]
    assert [str(device) for device in sorted(devices)] == ["cuda:2", "cuda:10", "cpu", "disk"]


@pytest.mark.parametrize(
    ("device", "spelling"),
    [
        (Device("cuda", 1), 1),
        (Device("xpu", 0), 0),
        (CPU, "cpu"),
        (Device("mps"), "mps"),
        (Device("disk"), "disk"),
    ],
)
def test_accelerate_gets_ints(device: Device, spelling: int | str) -> None:
    assert device.for_accelerate == spelling
    assert type(device.for_accelerate) is type(spelling)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("200 MiB", 200 * 2**20),
        ("5gb", 5 * 10**9),
        ("5gib", 5 * 2**30),
        ("1TB", 10**12),
        (" 12KB ", 12000),
        (77, 77),
    ],
)
def test_size(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5G", "-3", "5 XB", "1e9", "5GBs", "0x10", "٣GB", -1, True, None, "9" * 19]
)
def test_no_size(text: object) -> None:
    with pytest.raises(DeviceMapError):
        parse_size(text)


@pytest.mark.parametrize("text", ["5Gb", "5Mb", "5Gib"])
def test_bits_are_refused(text: str) -> None:
    with pytest.raises(DeviceMapError, match="bits") as caught:
        parse_size(text)
    assert caught.value.hint == f"write {text[:-1]}B"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1536, "1.50 KiB"),
        (10 * 2**20, "10.0 MiB"),
        (999 * 2**20, "999 MiB"),
        (1000 * 2**20, "0.98 GiB"),
        (2**30 - 1, "1.00 GiB"),
        (24 * 2**30, "24.0 GiB"),
        (3 * 2**40, "3.00 TiB"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


def test_max_memory_round_trip_and_lookup() -> None:
    limits = MaxMemory.parse("0=20GiB,cpu=48GB")
    assert limits.get(Device("cuda", 0)) == 20 * 2**30
    assert limits.get(CPU) == 48 * 10**9
    assert limits.get(Device("cuda", 1)) is None
    assert MaxMemory.parse(str(limits)) == limits
    assert MaxMemory.parse({0: "20GiB", "cpu": 48 * 10**9}) == limits


def test_max_memory_of_another_kind_of_accelerator() -> None:
    assert MaxMemory.parse("0=1GiB,cuda:1=2GiB").on("xpu").limits == (
        (Device("xpu", 0), 2**30),
        (Device("cuda", 1), 2**31),
    )


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 0),
        ("0", 0),
        ("0=20GiB,,cpu=1GB", 8),
        ("0=20GiB,gpu=1GB", 8),
        ("0=many", 2),
        ("0=5Gb", 2),
        ("0=1GB,cuda:0=2GB", 6),
        ("disk=5GB", 0),
        ("=5GB", 0),
        ("0=", 2),
    ],
)
def test_max_memory_errors_point_at_the_character(text: str, position: int) -> None:
    with pytest.raises(DeviceMapError) as caught:
        MaxMemory.parse(text)
    assert caught.value.position == position
    assert caught.value.message.startswith("max memory: ")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        (0, 0),
        ("24GiB", 24 << 30),
        ("24B", 24),
        ("1048576", 1 << 20),
        (1 << 30, 1 << 30),
        ("1KB", 1000),
    ],
)
def test_capacity(text: str | int, size: int) -> None:
    assert parse_capacity(text) == size


@pytest.mark.parametrize(
    ("text", "readings"),
    [("24", "24 bytes, or 24 GiB?"), ("1.5", "1.5 bytes, or 1.5 GiB?"), (24, "24 bytes, or 24 GiB?"),
     ("20480", "20480 bytes, or 20480 MiB?"), (" 6 ", "6 bytes, or 6 GiB?")],
)  # fmt: skip
def test_a_few_bytes_are_no_capacity(text: str | int, readings: str) -> None:
    with pytest.raises(DeviceMapError, match="has no unit") as caught:
        parse_capacity(text)
    assert readings in caught.value.message
    assert parse_capacity((caught.value.hint or "").split()[1].rstrip(",")) >= 1 << 30
