"""The zeros of a packed linear, read as they were written, even where the config is wrong about them.

`qzeros` stores them in one of three ways:

    gptq      zero - 1 in every field, modulo 2^bits (AutoGPTQ, and this tool)
    gptq_v2   the zero itself
    words     zero - 1 as GPTQModel computes it: a constant with a 1 in every field is subtracted from whole
              32-bit words, so that a zero of 0 borrows from its neighbour. Adding the constant to the words,
              modulo 2^32, undoes it exactly (convert_gptq_v2_to_v1_format_module in its utils/model.py).

Unless a zero is 0, the first and the third are the same. With 3 bits, fields cross word borders: GPTQModel
before 7.0 used constants whose words are in the wrong order, so that even symmetric zeros differ from gptq;
from 7.0 on it subtracts field by field.

The config says which of the three it is, but may be wrong (saving with Transformers leaves gptq_v2 zeros
under the name gptq). For symmetric codes the right one can be recognised: every zero is the middle code,
2^(bits-1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptq_cli.checkpoint.format import WORDS, PackedFormat
from gptq_cli.gptq.packing import V1, V2, fields_to_zeros, pack_rows, unpack_rows, zeros_to_fields
from gptq_cli.wording import number_of

_ONES = {bits: sum(1 << place for place in range(0, 32, bits)) for bits in (2, 4, 8)}
_THREE_BITS = (0x24924924, 0x92492492, 0x49249249)
"""GPTQModel's constants for 3 bits before 7.0: those of the third, second and first word of every three."""


@dataclass(frozen=True, slots=True)
class Zeros:
    """The zeros of one linear."""

    values: Tensor  # (G, N) uint8
    stored: str
    """How they are stored: "gptq", "gptq_v2" or "words"."""
    known: bool
    """False: the codes are symmetric, but in none of the three ways are all zeros the middle code; they are
    read as the config says."""


def read_zeros(
    qzeros: Tensor,  # (G, ceil(N * bits / 32)) int32
    form: PackedFormat,
    out_features: int,
) -> Zeros:
    """Read the zeros as `form` declares; symmetric ones in the way that makes them symmetric."""
    declared = form.zeros
    first = _read(qzeros, form.bits, out_features, declared)
    if not form.sym or _symmetric(first, form.bits):
        return Zeros(first, declared, known=True)
    for other in (V1, V2, WORDS):
        if other != declared and _symmetric(
            values := _read(qzeros, form.bits, out_features, other), form.bits
        ):
            return Zeros(values, other, known=True)
    return Zeros(first, declared, known=False)


def _symmetric(values: Tensor, bits: int) -> bool:
    return bool((values == 1 << (bits - 1)).all())


def _read(qzeros: Tensor, bits: int, out_features: int, stored: str) -> Tensor:
    words = shift_words(qzeros, bits, 1) if stored == WORDS else qzeros
    fields = unpack_rows(words.t().contiguous(), bits, out_features).t()
    return fields_to_zeros(fields, bits, V1 if stored == V1 else V2).contiguous()


def store_zeros(values: Tensor, bits: int, checkpoint_format: str) -> Tensor:
    """(G, N) uint8 zeros as `qzeros` of "gptq" (field by field) or "gptq_v2"."""
    fields = zeros_to_fields(values, bits, checkpoint_format)
    return pack_rows(fields.t().contiguous(), bits).t().contiguous()


def shift_words(qzeros: Tensor, bits: int, sign: int) -> Tensor:
    """Add (`sign` 1) GPTQModel's constant to all words, or subtract it (-1), modulo 2^32."""
    count = qzeros.shape[1]
    constants = [_THREE_BITS[i % 3] for i in range(count)] if bits == 3 else [_ONES[bits]] * count
    added = torch.tensor(constants, dtype=torch.int64, device=qzeros.device)
    total = (qzeros.long() + sign * added) & 0xFFFFFFFF
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


_NAMES = {V1: "gptq", V2: "gptq_v2", WORDS: "GPTQModel's gptq"}


@dataclass(slots=True)
class ZerosTally:
    """Counts how the zeros of a checkpoint were read, to report each way in one sentence."""

    linears: int = 0
    others: dict[tuple[str, str], int] = field(default_factory=dict)
    """(declared, found) -> linears."""
    unknown: int = 0

    def add(self, declared: str, zeros: Zeros) -> None:
        """Count one linear."""
        self.linears += 1
        self.unknown += not zeros.known
        if zeros.stored != declared:
            key = declared, zeros.stored
            self.others[key] = self.others.get(key, 0) + 1

    def sentences(self) -> Iterator[str]:
        """Notes for the user; none where all zeros are as the config says."""
        for (declared, found), count in self.others.items():
            yield (
                f"{count:,} of {number_of(self.linears, 'linear')} "
                f"{'stores its' if count == 1 else 'store their'} zeros as in {_NAMES[found]}, though the "
                f"config says {_NAMES[declared]}: their codes are symmetric, so they are read as "
                f"{_NAMES[found]}; in other readers every weight may be off by one step"
            )
        if self.unknown:
            yield (
                f"{self.unknown:,} of {number_of(self.linears, 'linear')} "
                f"{'has' if self.unknown == 1 else 'have'} zeros that do not fit symmetric codes, "
                "though sym is true (or missing): they are read as the config says; other readers may "
                "ignore them"
            )
