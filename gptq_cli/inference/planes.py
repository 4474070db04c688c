"""The codes of a linear, padded and re-expressed so that a 4-bit kernel takes them.

All kernels compute `w = (q - 8) * scale + shift` with q in 0..15. Three things are done to get there:

- 2- and 3-bit codes move up until their zero is 8: exact, q + 8 - z stays in 0..15.
- An 8-bit code becomes two: q - 128 = 16 (hi - 8) + lo. The linear then has two *planes* of rows, its input
  is written twice, and the products of both planes add up inside the kernel.
- Rows are padded to whole groups, columns to whole blocks. The caller pads its input with zeros, so that the
  values of padded rows do not matter, and drops the padded columns.

torch's kernels take groups of 32, 64, 128 or 256 rows only. A group that is a multiple of one of them repeats
its scale; a whole row (`group_size` -1) does so, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gptq_cli.checkpoint.codes import LinearCodes, as_four_bits

LEGAL_GROUPS = (256, 128, 64, 32)
"""Rows that a group may have in torch's int4 kernels."""
COLUMN_BLOCK = 64
"""Columns are padded to whole blocks of this many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planes:
    """What a kernel is built from. Groups are runs of `group` rows; `row_group` says where they are not."""

    linear: LinearCodes
    """Four bits, or eight with two planes; not padded."""
    scales: Tensor  # (groups, columns), in the checkpoint's dtype
    zeros: Tensor  # (groups, columns) int16; the middle is 8, or 128 with two planes
    rows: int
    columns: int
    group: int
    planes: int
    row_group: Tensor | None = None

    @property
    def middle(self) -> int:
        """The zero for which no shift is needed."""
        return 8 if self.planes == 1 else 128

    @property
    def shifted(self) -> bool:
        """True when some zero is not the middle."""
        return not bool((self.zeros == self.middle).all())

    def codes(self) -> Tensor:
        """(planes * rows, columns) uint8 in 0..15."""
        linear = self.linear
        codes = _pad(linear.rows(), self.rows - linear.in_features, self.columns - linear.out_features)
        return codes if self.planes == 1 else torch.cat([codes >> 4, codes & 15])

    def words(self) -> Tensor | None:
        """(rows / 8, columns) int32 words of 4-bit codes where they can stay as in the file; else None."""
        linear = self.linear
        same = (linear.in_features, linear.out_features) == (self.rows, self.columns)
        ready = linear.words is not None and linear.bits == 4 and linear.order is None
        return linear.words if ready and same and self.rows % 8 == 0 else None

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Scales and shifts of all planes, (planes * groups, columns) each: for kernels that see one matrix.

        Float32. A plane's w is (q - 8) * scale + shift, q its own four bits.
        """
        scales = self.scales.float()
        if self.planes == 1:
            return scales, (8 - self.zeros) * scales
        low_shift = (136 - self.zeros) * scales
        return torch.cat([16 * scales, scales]), torch.cat([torch.zeros_like(low_shift), low_shift])


def why_not_fused(linear: LinearCodes) -> str | None:
    """Why no built-in int4 kernel can take this linear, or None."""
    if linear.row_group is not None:
        return "g_idx gives the groups different numbers of columns"
    if linear.group != linear.in_features and _legal_group(linear) is None:
        return f"group size {linear.group} is no multiple of 32"
    return None


def _legal_group(linear: LinearCodes) -> int | None:
    """The largest group a kernel takes that divides this linear's; for a whole row, one that pads little."""
    if linear.group != linear.in_features:
        return next((legal for legal in LEGAL_GROUPS if linear.group % legal == 0), None)
    rows = linear.in_features
    return next((legal for legal in LEGAL_GROUPS if -rows % legal <= rows // 32), LEGAL_GROUPS[-1])


def make_planes(linear: LinearCodes, *, fused: bool) -> Planes:
    """Re-express `linear`; `fused`: in groups that torch's int4 kernels take (`why_not_fused` is None)."""
    linear = as_four_bits(linear)
    scales, zeros, group = linear.scales, linear.zeros, linear.group
    rows = linear.in_features
    if fused:
        legal = _legal_group(linear)
        assert legal is not None
        groups = -(-rows // legal)
        repeats = -(-group // legal)
        scales = scales.repeat_interleave(repeats, 0)[:groups]
        zeros = zeros.repeat_interleave(repeats, 0)[:groups]
        group = legal
    if linear.row_group is None:
        rows = -(-rows // group) * group
    columns = -(-linear.out_features // COLUMN_BLOCK) * COLUMN_BLOCK
    more_columns = columns - linear.out_features
    planes = 2 if linear.bits == 8 else 1
    return Planes(
        linear=linear,
        scales=_pad(scales, 0, more_columns),
        zeros=_pad(zeros, 0, more_columns, 8 if planes == 1 else 128),
        rows=rows,
        columns=columns,
        group=group,
        planes=planes,
        row_group=linear.row_group,
    )


def _pad(tensor: Tensor, rows: int, columns: int, value: int = 0) -> Tensor:
    return functional.pad(tensor, (0, columns, 0, rows), value=value) if rows or columns else tensor
