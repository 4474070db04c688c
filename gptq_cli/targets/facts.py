"""What the rules of the readers need to know of a checkpoint, made or planned: settings and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from gptq_cli.model.facts import NO_HEADS, HeadCounts, Split
from gptq_cli.placement.names import fold, leaf, owner
from gptq_cli.readers import Target
from gptq_cli.rules import Remark
from gptq_cli.targets.names import FUSED
from gptq_cli.wording import names_text

TARGETS: tuple[Target, ...] = get_args(Target)
_EXPERT = re.compile(r"\.experts?\.")


def is_expert(name: str) -> bool:
    """Whether a linear is one of a mixture's experts, by its name."""
    return _EXPERT.search(name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetLinear:
    """One quantized linear: K = in_features, N = out_features."""

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    split: Split = "whole"
    source_name: str = ""
    """Its name in the files where `name` is that in the model."""
    interleaved: bool = False
    """The model's class has its rows alternate with those of another linear, in a tensor of fused experts."""

    @property
    def is_expert(self) -> bool:
        """Whether it is one of a mixture's experts, by its name."""
        return is_expert(self.name)

    @property
    def settings(self) -> tuple[int, int, bool, bool]:
        """What readers want to be equal in all parts of a fused matrix."""
        return self.bits, self.group_size, self.sym, self.desc_act


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What the rules need to know of a checkpoint, made or planned."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: str
    """"gptq" (v1) or "gptq_v2"."""
    dtype: str
    """Of the dense tensors: "bfloat16"."""
    linears: tuple[TargetLinear, ...]
    dense: tuple[str, ...] = ()
    """Linears of the blocks that are not quantized."""
    dense_experts: tuple[str, ...] = ()
    """Tensors of fused experts that are not quantized."""
    shared: tuple[str, ...] = ()
    """Linears whose weight is that of a packed one: it is stored once."""
    scale_dtype: str = "float16"
    lm_head: bool = False
    """The head is quantized."""
    modules_listed: bool = False
    """`modules_in_block_to_quantize` is there."""
    blocks_found: bool = True
    """Optimum finds the blocks, by itself or by `block_name_to_quantize`; always so in our own files."""
    trivial_g_idx: bool = True
    """Every g_idx is i // group_size; always so in our own files without desc_act."""
    in_config_json: bool = True
    """config.json holds the quantization dictionary, not only quantize_config.json."""
    heads: HeadCounts = NO_HEADS
    hidden_size: int = 0
    tp: int = 1
    """Ranks of tensor parallelism."""

    @property
    def changed(self) -> bool:
        """`dynamic` gives some linears other settings."""
        return len({linear.settings for linear in self.linears}) > 1


@dataclass(frozen=True, slots=True)
class FusedMatrix:
    """What a server loads as one matrix: linears of one module, quantized or dense."""

    name: str
    """`model.layers.0.self_attn.qkv_proj`; of a linear that is not fused, its own."""
    linears: tuple[TargetLinear, ...]
    """Its quantized parts."""
    dense: tuple[str, ...] = ()
    """Its dense parts."""

    @property
    def out_features(self) -> int:
        """N of all quantized parts together."""
        return sum(linear.out_features for linear in self.linears)


@dataclass(frozen=True, slots=True)
class Case:
    """One reader and one checkpoint."""

    target: Target
    facts: TargetFacts

    @property
    def bits(self) -> list[int]:
        """All bit widths, ascending."""
        return sorted({self.facts.bits, *(linear.bits for linear in self.facts.linears)})

    @property
    def groups(self) -> list[int]:
        """All group sizes, ascending."""
        return sorted({self.facts.group_size, *(linear.group_size for linear in self.facts.linears)})

    @property
    def asymmetric(self) -> bool:
        """Some codes are asymmetric."""
        return not (self.facts.sym and all(linear.sym for linear in self.facts.linears))

    @property
    def experts(self) -> list[TargetLinear]:
        """The linears that are experts."""
        return [linear for linear in self.facts.linears if linear.is_expert]

    @property
    def matrices(self) -> list[FusedMatrix]:
        """What vLLM and SGLang load as one matrix each; without experts, and the head, which both pad."""
        inside = [x for x in self.facts.linears if not x.is_expert and fold(x.name) != x.name]
        places = {(owner(x.name), leaf(x.name)): x for x in inside}
        dense = {(owner(name), leaf(name)): name for name in self.facts.dense}
        return list(_matrices(places, dense))

    def remark(self, message: str, hint: str = "", linears: Sequence[TargetLinear] = ()) -> Remark:
        """A remark about this case; `linears` are named, the first of them in the message."""
        if linears:
            first = linears[0]
            shape = f"{first.name} ({first.in_features} x {first.out_features})"
            message = f"{names_text([shape, *linears[1:]], 1)}: {message}"
        return Remark(
            subject=self.target,
            message=message,
            hint=hint,
            modules=tuple(linear.name for linear in linears),
        )


def _matrices(
    places: dict[tuple[str, str], TargetLinear], dense: dict[tuple[str, str], str]
) -> Iterator[FusedMatrix]:
    family = {part: (parts, names[0]) for parts, names in FUSED.items() for part in parts}
    seen: set[tuple[str, str]] = set()
    for (above, last), linear in places.items():
        parts, name = family.get(last, ((last,), last))
        if (above, name) in seen:
            continue
        seen.add((above, name))
        held = tuple(places[above, part] for part in parts if (above, part) in places)
        left = tuple(dense[above, part] for part in parts if (above, part) in dense)
        whole = f"{above}.{name}" if len(held) + len(left) > 1 else linear.name
        yield FusedMatrix(whole, held, left)
