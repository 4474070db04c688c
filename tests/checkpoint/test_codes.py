"""Packed tensors become codes: every bit width, both versions, any column order, against the slow packer."""

from __future__ import annotations

import pytest
import torch

from gptq_cli.checkpoint.checkpoint import PackedInfo, trivial_g_idx
from gptq_cli.checkpoint.codes import LinearCodes, as_four_bits, codes_of, dequantize
from gptq_cli.checkpoint.format import PackedFormat
from gptq_cli.gptq.packing import PackedTensors
from tests.checkpoint.checkpoints import Packed, Recipe, quantize_slowly


def read(packed: Packed, recipe: Recipe, g_idx: torch.Tensor | None = None) -> LinearCodes:
    """The codes; `g_idx`: in the place of that of `packed`."""
    rows, columns = packed.weight.shape
    form = PackedFormat(
        bits=recipe.bits,
        group_size=recipe.group_size,
        sym=recipe.sym,
        desc_act=recipe.desc_act,
        checkpoint_format=recipe.version,
    )
    info = PackedInfo(
        name="layer",
        source_name="layer",
        in_features=columns,
        out_features=rows,
        format=form,
        bias=False,
        has_g_idx=recipe.g_idx,
        transposed=False,
    )
    own = packed.g_idx if recipe.g_idx else trivial_g_idx(info)
    tensors = PackedTensors(
        qweight=packed.qweight,
        qzeros=packed.qzeros,
        scales=packed.scales,
        g_idx=own if g_idx is None else g_idx,
    )
    return codes_of(info, tensors)


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
