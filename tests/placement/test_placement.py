"""Placements: lookups by whole components, what is offloaded, what accelerate gets."""

from __future__ import annotations

import pytest

from gptq_cli.errors import DeviceMapError
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.placement import Placement, PlacementEntry

CUDA0, CUDA1 = Device("cuda", 0), Device("cuda", 1)


def placement(**homes: Device) -> Placement:
    entries = tuple(
        PlacementEntry(name.replace("__", "."), device, 10, name != "model__rotary_emb")
        for name, device in homes.items()
    )
    return Placement(entries, CUDA0, "test")


MIXED = placement(
    model__embed_tokens=CUDA0,
    model__layers__1=CUDA0,
    model__layers__10=CUDA1,
    model__layers__2=CPU,
    model__rotary_emb=CPU,
    lm_head=CPU,
)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("model.embed_tokens", CUDA0),
        ("model.embed_tokens.weight", CUDA0),
        ("model.layers.1.mlp.up_proj.weight", CUDA0),
        ("model.layers.10.mlp.up_proj.weight", CUDA1),
        ("lm_head", CPU),
    ],
)
def test_device_of(name: str, device: Device) -> None:
    assert MIXED.device_of(name) == device


def test_a_module_above_entries_has_a_device_only_if_they_agree() -> None:
    assert placement(a__b=CPU, a__c=CPU, d=CUDA0).device_of("a") == CPU
    with pytest.raises(DeviceMapError, match="several devices"):
        MIXED.device_of("model")


def test_what_is_not_covered_raises() -> None:
    with pytest.raises(DeviceMapError, match="not in the placement"):
        MIXED.device_of("model.layers.3")


def test_one_entry_covers_all() -> None:
    assert placement(**{"": CUDA1}).device_of("anything.at.all") == CUDA1
    assert placement(**{"": CUDA1}).device_of("") == CUDA1


def test_offloaded_is_cpu_beside_others() -> None:
    assert MIXED.offloaded == ("model.layers.2", "model.rotary_emb", "lm_head")
    assert placement(a=CPU, b=CPU).offloaded == ()
    assert placement(a=CUDA0, b=CUDA1).offloaded == ()


def test_devices_and_sizes() -> None:
    assert MIXED.devices == (CUDA0, CUDA1, CPU)
    assert MIXED.size_bytes == ((CUDA0, 20), (CUDA1, 10), (CPU, 30))


def test_accelerate_gets_ints_for_indexes() -> None:
    assert MIXED.accelerate_map() == {
        "model.embed_tokens": 0,
        "model.layers.1": 0,
        "model.layers.10": 1,
        "model.layers.2": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
