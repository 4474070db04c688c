"""Packed tensors become codes: every bit width, both versions, any column order, against the slow packer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gptq_cli.checkpoint.codes import LinearCodes, as_four_bits, dequantize, read_codes
from gptq_cli.errors import CheckpointError
from tests.checkpoint.checkpoints import Packed, Recipe, quantize_slowly


def read(packed: Packed, recipe: Recipe, **changed: Any) -> LinearCodes:
    rows, columns = packed.weight.shape
    fields: dict[str, Any] = {
        "qweight": packed.qweight,
        "qzeros": packed.qzeros,
        "scales": packed.scales,
        "g_idx": packed.g_idx if recipe.g_idx else None,
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "desc_act": recipe.desc_act,
        "checkpoint_format": recipe.version,
        "in_features": columns,
        "out_features": rows,
    }
    return read_codes("layer", **(fields | changed))


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_every_format_gives_the_weight_it_stands_for(
    bits: int, version: str, sym: bool, desc_act: bool
) -> None:
    recipe = Recipe(bits=bits, group_size=16, sym=sym, version=version, desc_act=desc_act)
    packed = quantize_slowly(random_weight(24, 64), recipe)
    assert torch.equal(dequantize(read(packed, recipe)).double(), packed.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 37, 16), (33, 40, -1), (7, 96, 64)])
def test_sizes_that_fill_no_word_and_no_group(bits: int, rows: int, columns: int, group: int) -> None:
    recipe = Recipe(bits=bits, group_size=group, sym=False, version="gptq_v2")
    packed = quantize_slowly(random_weight(rows, columns), recipe)
    assert torch.equal(dequantize(read(packed, recipe)).double(), packed.weight)


def test_without_g_idx_groups_are_in_place() -> None:
    recipe = Recipe(g_idx=False)
    packed = quantize_slowly(random_weight(16, 48), recipe)
    codes = read(packed, recipe)
    assert codes.order is None
    assert torch.equal(dequantize(codes).double(), packed.weight)


def test_g_idx_of_zeros_means_no_order_unless_desc_act() -> None:
    packed = quantize_slowly(random_weight(16, 48), Recipe())
    zeros = torch.zeros(48, dtype=torch.int32)
    codes = read(packed, Recipe(), g_idx=zeros)
    assert torch.equal(dequantize(codes).double(), packed.weight)
    ordered = read(packed, Recipe(), g_idx=zeros, desc_act=True)
    assert ordered.row_group is not None


def test_uneven_groups_keep_their_rows() -> None:
    """A g_idx that gives one group 20 columns and another 12 is legal; it is just no run of 16."""
    packed = quantize_slowly(random_weight(8, 32), Recipe())
    g_idx = torch.tensor([0] * 20 + [1] * 12, dtype=torch.int32)[torch.randperm(32)]
    codes = read(packed, Recipe(), g_idx=g_idx)
    assert codes.row_group is not None
    expected = (packed.codes.double() - 8) * packed.scales.double().T[:, g_idx.long()]
    assert torch.equal(dequantize(codes).double(), expected)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_narrow_codes_as_four_bits_are_exact(bits: int, version: str) -> None:
    recipe = Recipe(bits=bits, sym=False, version=version)
    codes = read(quantize_slowly(random_weight(16, 64), recipe), recipe)
    wide = as_four_bits(codes)
    assert wide.bits == 4
    assert int(wide.rows().max()) <= 15
    assert bool((wide.zeros == 8).all())
    assert torch.equal(dequantize(wide), dequantize(codes))


def test_wide_codes_are_left_alone() -> None:
    codes = read(quantize_slowly(random_weight(8, 32), Recipe()), Recipe())
    assert as_four_bits(codes) is codes


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_wrong_shape_names_the_tensor(part: str) -> None:
    packed = quantize_slowly(random_weight(16, 64), Recipe())
    cut = getattr(packed, part)[:-1]
    with pytest.raises(CheckpointError, match=rf"layer\.{part} has shape"):
        read(replace(packed, **{part: cut}), Recipe())


@pytest.mark.parametrize("value", [-1, 4])
def test_g_idx_out_of_range(value: int) -> None:
    packed = quantize_slowly(random_weight(16, 64), Recipe())
    packed.g_idx[3] = value
    with pytest.raises(CheckpointError, match=r"layer\.g_idx holds groups"):
        read(packed, Recipe())
