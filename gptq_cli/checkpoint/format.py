"""The dictionary that describes a GPTQ checkpoint, and the shapes that follow from it.

It is stored twice, in `config.json["quantization_config"]` and in `quantize_config.json`, and different tools
write it differently. This module has what we write, and how we read what others wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from gptq_cli import __version__
from gptq_cli.checkpoint.dynamic_rules import DynamicRules, parse_dynamic
from gptq_cli.config import QuantizeConfig
from gptq_cli.errors import CheckpointError
from gptq_cli.module_settings import ALLOWED_BITS
from gptq_cli.wording import as_json

PART_DTYPES = MappingProxyType({"qweight": "int32", "qzeros": "int32", "scales": "float16", "g_idx": "int32"})
"""The tensors of a packed linear, `<linear>.qweight` and so on, in order, with the dtypes that we write."""
PARTS = tuple(PART_DTYPES)
FORMATS = ("gptq", "gptq_v2")
WORDS = "words"
"""Zeros of format gptq as GPTQModel computes them; see `checkpoint.zeros`."""
_SUBTRACTS_WORDS = re.compile(r"(gptq[-_ ]?model|auto[-_ ]?gptq)\w*(?:\s*:\s*v?(\d+))?", re.IGNORECASE)
"""In `meta`: GPTQModel, and its predecessor AutoGPTQ from 0.8 on; earlier versions write no `meta`."""
_THREE_BITS_BY_FIELDS = 7
"""From this version on, GPTQModel subtracts field by field where codes have 3 bits (its PR 2763)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """How the codes of one linear are stored."""

    bits: int
    group_size: int
    """-1: one group per row."""
    sym: bool
    desc_act: bool
    checkpoint_format: str
    """"gptq": qzeros hold zero - 1; "gptq_v2": the zero itself."""
    bits_by_words: tuple[int, ...] = ()
    """Bit widths at which the writer of format "gptq" subtracts from whole words, see `checkpoint.zeros`."""

    @property
    def zeros(self) -> str:
        """How the config says that zeros are stored: "gptq", "gptq_v2" or "words"."""
        by_words = self.checkpoint_format == "gptq" and self.bits in self.bits_by_words
        return WORDS if by_words else self.checkpoint_format

    def groups(self, in_features: int) -> int:
        """Groups per row of `in_features` columns."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the four tensors of a linear."""
        groups = self.groups(in_features)
        sizes = (
            (-(-in_features * self.bits // 32), out_features),
            (groups, -(-out_features * self.bits // 32)),
            (groups, out_features),
            (in_features,),
        )
        return dict(zip(PARTS, sizes, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFormat:
    """A parsed quantization dictionary."""

    base: PackedFormat
    quantizer: str
    """`meta.quantizer`, "" when there is none."""
    dynamic: DynamicRules
    """Linears that are dense, or have other settings."""
    notes: tuple[str, ...]

    def of(self, module: str) -> PackedFormat | None:
        """The format of one linear; None where `dynamic` leaves it dense."""
        dense, fields = self.dynamic.of(module)
        if dense:
            return None
        if not fields:
            return self.base
        return _checked(replace(self.base, **fields), f"{self.dynamic.place(module)} for {module}")


def quantization_dict(
    quantize: QuantizeConfig,
    *,
    dynamic: Mapping[str, Mapping[str, Any]],
    modules_in_block: tuple[str, ...],
    block_name: str,
    lm_head: bool,
) -> dict[str, Any]:
    """The dictionary we write. What it says of linears and blocks is made in `checkpoint.declared`."""
    result: dict[str, Any] = {
        "bits": quantize.bits,
        "group_size": quantize.group_columns,
        "sym": quantize.sym,
        "desc_act": quantize.desc_act,
        "quant_method": "gptq",
        "checkpoint_format": quantize.checkpoint_format,
        "format": quantize.checkpoint_format,
        "lm_head": lm_head,
        "dynamic": {pattern: dict(fields) for pattern, fields in dynamic.items()},
        "pack_dtype": "int32",
        "true_sequential": quantize.true_sequential,
        "damp_percent": quantize.damp_percent,
        "meta": {"quantizer": [f"gptq-cli:{__version__}"]},
    }
    if modules_in_block:
        result["modules_in_block_to_quantize"] = [list(modules_in_block)]
    if block_name:
        result["block_name_to_quantize"] = block_name
    return result


def parse_quantization(raw: Mapping[str, Any], where: str, dynamic_where: str = "") -> CheckpointFormat:
    """Read the dictionary of the file `where`, written by any tool. Raises `CheckpointError`.

    `dynamic_where`: the file that `dynamic` comes from, where that is another one.
    """
    method = _or_default(raw.get("quant_method"), default="gptq")
    if method != "gptq":
        raise CheckpointError(
            f"{where}: quant_method is {as_json(method)}; allowed: gptq",
            hint=f"open it with a tool that reads {method}" if isinstance(method, str) else None,
        )
    if raw.get("is_marlin_format"):
        raise CheckpointError(
            f"{where}: the tensors are in Marlin's own order (is_marlin_format), not in GPTQ's",
            hint="use the original GPTQ checkpoint; servers repack it for Marlin themselves",
        )
    pack_dtype = raw.get("pack_dtype", "int32")
    if pack_dtype not in ("int32", None):
        raise CheckpointError(
            f"{where}: pack_dtype is {as_json(pack_dtype)}; allowed: int32", hint="gptqmodel reads it"
        )
    notes: list[str] = []
    formats = [raw[key] for key in ("checkpoint_format", "format") if raw.get(key) is not None]
    if len(set(map(str, formats))) > 1:
        first, second = map(as_json, formats)
        raise CheckpointError(f"{where}: checkpoint_format is {first} but format is {second}")
    if not formats:
        notes.append(f"{where} has no checkpoint_format: read as gptq (v1)")
    sym = raw.get("sym")
    if sym is None:
        notes.append(f"{where} does not say whether codes are symmetric: read as sym = true")
        sym = True
    for key in ("bits", "group_size"):
        if key not in raw:
            raise CheckpointError(f"{where} has no {key}", hint="it is not a complete GPTQ checkpoint")
    base = PackedFormat(
        bits=raw["bits"],
        group_size=raw["group_size"],
        sym=sym,
        desc_act=_or_default(raw.get("desc_act"), default=False),
        checkpoint_format=formats[0] if formats else "gptq",
        bits_by_words=_bits_by_words(raw.get("meta")),
    )
    return CheckpointFormat(
        base=_checked(base, where),
        quantizer=_quantizer(raw.get("meta")),
        dynamic=parse_dynamic(raw.get("dynamic"), dynamic_where or where),
        notes=tuple(notes),
    )


def _checked(found: PackedFormat, where: str) -> PackedFormat:
    bits, group = found.bits, found.group_size
    if type(bits) is not int or bits not in ALLOWED_BITS:  # True is an int, and 4.0 is in (2, 3, 4, 8)
        allowed = ", ".join(map(str, ALLOWED_BITS))
        raise CheckpointError(f"{where}: bits is {as_json(bits)}; allowed: {allowed}")
    if type(group) is not int or (group < 1 and group != -1):
        allowed = "-1 or a positive whole number"
        raise CheckpointError(f"{where}: group_size is {as_json(group)}; allowed: {allowed}")
    for name in ("sym", "desc_act"):
        if not isinstance(getattr(found, name), bool):
            value = as_json(getattr(found, name))
            raise CheckpointError(f"{where}: {name} is {value}; allowed: true, false")
    if found.checkpoint_format not in FORMATS:
        raise CheckpointError(
            f"{where}: checkpoint_format is {as_json(found.checkpoint_format)}; "
            f"allowed: {', '.join(FORMATS)}",
            hint="gptqmodel reads its other formats",
        )
    return found


def _or_default(value: Any, *, default: Any) -> Any:
    """null means the same as an absent key."""
    return default if value is None else value


def _bits_by_words(meta: object) -> tuple[int, ...]:
    """Bit widths at which the tool that `meta` names subtracts from whole words of zeros."""
    named = (meta.get("packer"), meta.get("quantizer")) if isinstance(meta, Mapping) else ()
    for value in named:
        found = _SUBTRACTS_WORDS.search(str(value)) if value is not None else None
        if found is not None:
            early = found[2] is not None and int(found[2]) < _THREE_BITS_BY_FIELDS
            return (2, 3, 4, 8) if early else (2, 4, 8)
    return ()


def _quantizer(meta: object) -> str:
    named = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if isinstance(named, str):
        return named
    return ", ".join(str(item) for item in named) if isinstance(named, list) else ""
