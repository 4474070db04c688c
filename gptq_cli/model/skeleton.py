"""A model without its weights: everything that can be decided before a weight is read.

The model is built on the meta device (a 70B-parameter one takes well under a second and no memory), its
blocks and linears are found, and every linear is matched with the tensor of the checkpoint that is its
weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gptq_cli.config import ModelRef
from gptq_cli.model.architecture import (
    load_config,
    raw_config,
)
from gptq_cli.model.beside import (
    LEFT_OUT,
    UNREACHED,
    BesideInfo,
    check_runs_on_text,
    parts_beside,
    unreached_linears,
)
from gptq_cli.model.blocks import all_linears, find_blocks, shape
from gptq_cli.model.candidates import candidates_of, kept_dense, own_names_of, shared_linears
from gptq_cli.model.conversion import Conversion, KeyMap, natural_key, tied_groups
from gptq_cli.model.dense import DenseInfo, fold_dense
from gptq_cli.model.expert_linears import ExpertLinear, unfuse
from gptq_cli.model.expert_names import ExpertSource, linears_in_part, named_experts
from gptq_cli.model.experts import FoundExperts, find_experts
from gptq_cli.model.facts import dtype_name
from gptq_cli.model.few_bits import decoded_files
from gptq_cli.model.meta import build_meta
from gptq_cli.model.source import READABLE, ModelFiles, SourceProblem
from gptq_cli.model.trace import Trace, trace

_FLOATS = {"float16", "bfloat16", "float32", "float64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasCut:
    """The bias of one expert's linear: a part of a tensor (E, N) of the checkpoint."""

    source_key: str
    expert: int
    outputs: tuple[int | None, int | None, int | None]
    """Which of the N values: start, stop, step."""

    def of(self, biases: Tensor) -> Tensor:  # (E, N) -> (its outputs,)
        """The part of the whole tensor."""
        return biases[self.expert][slice(*self.outputs)].contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearInfo:
    """One linear that will be quantized."""

    name: str
    """In the model: `transformer.h.0.attn.c_attn`."""
    block: str
    source_key: str
    """The checkpoint's tensor that is its weight, or holds a part of it: `h.0.attn.c_attn.weight`."""
    in_features: int
    """K."""
    out_features: int
    """N."""
    bias: bool
    transposed: bool
    """Conv1D: the weight is stored (K, N)."""
    stored_as: str = ""
    """Where `source_key` is not its weight alone, or not all of it: its own name in the checkpoint."""
    held_with: tuple[str, ...] = ()
    """The other tensors that hold a part of its weight."""
    also_at: tuple[str, ...] = ()
    """The other linears that have this weight, where it is shared (Zamba's transformer): they run later, or
    not at all."""
    bias_cut: BiasCut | None = None
    """Where the bias is, if it is a part of a tensor."""

    @property
    def source_name(self) -> str:
        """The linear's own name in the checkpoint, used for its `qweight` and the other packed tensors."""
        return self.stored_as or self.source_key.removesuffix(".weight")

    @property
    def sources(self) -> tuple[str, ...]:
        """All tensors of the checkpoint that its weight is made of."""
        return (self.source_key, *self.held_with)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A model on the meta device and what is known about it."""

    config: Any
    model: Any
    """`PreTrainedModel` on the meta device, in eval mode."""
    files: ModelFiles
    ref: ModelRef
    blocks_prefix: str
    blocks: tuple[str, ...]
    linears: tuple[LinearInfo, ...]
    """In model order."""
    dense: tuple[DenseInfo, ...]
    trace: Trace
    """The result of a forward without data: stages, order, routed linears."""
    dtype: torch.dtype
    """What the model runs in and dense tensors are written in."""
    already_quantized: str | None
    """The quantization that config.json names, where its weights cannot be decoded: see `few_bits`."""
    keys: KeyMap
    experts: FoundExperts
    """Modules whose linears were made of 3-D parameters, and the 3-D parameters that stay dense."""
    tied: tuple[tuple[str, ...], ...]
    beside: tuple[BesideInfo, ...]
    """Towers, and what the files hold beyond the model's class."""
    parameters: int
    """Number of parameters of the files; tied ones count once."""
    problems: tuple[SourceProblem, ...]
    """Of the files, and of files and model together: weights that are missing or have the wrong shape."""
    kept: Mapping[str, str]
    """Linears of the blocks that stay dense -> why."""
    own_names: Mapping[str, str]
    """Tensors of the model that Transformers computes from others in the files -> what each is called where
    it is stored as it is: see `Conversion.own_names`."""
    by_module: tuple[LinearInfo, ...] = ()
    """The linears in `kept` that `--module` names, see `model.selection`."""
    head: LinearInfo | None = None
    """The output head where it is quantized; its `block` is ""."""

    @property
    def quantized_share(self) -> float:
        """Part of the parameters that will be quantized, 0 to 1."""
        linears = self.linears if self.head_is_tied else self.packed
        return sum(x.in_features * x.out_features for x in linears) / max(1, self.parameters)

    @property
    def head_is_tied(self) -> bool:
        """True where the quantized head is one tensor with the embedding, which stays dense."""
        return self.head is not None and any(f"{self.head.name}.weight" in group for group in self.tied)

    @property
    def packed(self) -> tuple[LinearInfo, ...]:
        """Everything that is quantized: the linears of the blocks, and the head where it is."""
        return self.linears if self.head is None else (*self.linears, self.head)

    @property
    def shared(self) -> frozenset[str]:
        """Linears whose weight is that of one of the quantized linears."""
        return frozenset(name for linear in self.linears for name in linear.also_at)

    def linears_of(self, block: str) -> tuple[LinearInfo, ...]:
        """The linears of one block in module order."""
        return tuple(linear for linear in self.linears if linear.block == block)


def open_skeleton(files: ModelFiles, ref: ModelRef) -> Skeleton:
    """Build the model of `files` on the meta device and find its blocks and linears.

    Raises `ModelError`: remote code without permission, no text decoder, no blocks.
    """
    files, already = decoded_files(files, raw_config(files))
    config = load_config(files, ref)
    dtype = _choose_dtype(config, files, ref)
    model = build_meta(config, ref, dtype, tensors=len(files.tensors))
    prefix, blocks, traced = _traced(model)
    check_runs_on_text(files.source, model, blocks, traced)
    conversion = Conversion(model)
    keys = conversion.map(tensor.name for tensor in files.tensors)
    tied = tied_groups(model)
    experts, sources = named_experts(find_experts(model, blocks), conversion, keys, tied)
    unfuse(model, experts.experts)
    unreached = tuple(block for block in blocks if block not in traced.flow.blocks)
    blocks = traced.flow.blocks
    candidates = candidates_of(model, blocks)
    shared = shared_linears(tied, candidates, keys, traced)
    kept = kept_dense(model, traced, candidates, tied, shared)
    kept |= dict.fromkeys(unreached_linears(model, candidates, experts.experts, traced), UNREACHED)
    routed = {name for name in candidates if isinstance(model.get_submodule(name), ExpertLinear)}
    traced = replace(traced, idle=traced.idle | routed)  # they stood in a 3-D tensor when it was made
    own_names = own_names_of(conversion, keys, candidates, experts)
    found = tuple(_linears(model, blocks, keys, kept, sources, own_names, shared, known=bool(files.tensors)))
    in_part = linears_in_part(experts, {linear.name for linear in found})
    linears = tuple(linear for linear in found if linear.name not in in_part)
    beside = parts_beside(model, unreached, keys, files.tensors)
    left_out = sum(part.parameters for part in beside if part.reason == LEFT_OUT)
    parameters = sum(p.numel() for p in model.parameters()) + left_out
    return Skeleton(
        config=config,
        model=model,
        files=files,
        ref=ref,
        blocks_prefix=prefix,
        blocks=blocks,
        linears=linears,
        dense=fold_dense(
            model,
            {name for linear in linears for name in (linear.name, *linear.also_at)},
            blocks,
            kept,
            experts,
            beside,
            parameters,
        ),
        trace=traced,
        dtype=dtype,
        already_quantized=already,
        keys=keys,
        experts=experts,
        tied=tied,
        beside=beside,
        parameters=parameters,
        problems=(*files.problems, *(() if already else _mismatches(model, files, keys))),
        kept=kept,
        own_names=own_names,
    )


def _traced(model: Any) -> tuple[str, tuple[str, ...], Trace]:
    """The decoder's blocks: of all lists of blocks that a forward on text calls the one with most weights."""
    left_out: tuple[str, ...] = ()
    while True:
        prefix, blocks = find_blocks(model, left_out)
        traced = trace(model, candidates_of(model, blocks), blocks)
        if traced.flow.blocks:
            return prefix, blocks, traced
        left_out = (*left_out, prefix)  # an encoder of images or sound


def _choose_dtype(config: Any, files: ModelFiles, ref: ModelRef) -> torch.dtype:
    """The dtype that was given; else the config's; else that of most float bytes in the files; else
    float32."""
    if ref.dtype != "auto":
        return as_torch_dtype(ref.dtype)
    return config_dtype(config) or as_torch_dtype(main_dtype(files) or "float32")


def config_dtype(config: Any) -> torch.dtype | None:
    """The float dtype in a config, or in its text part."""
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    name = dtype_name(named)
    return as_torch_dtype(name) if name in _FLOATS else None


def main_dtype(files: ModelFiles) -> str | None:
    """The float dtype that most bytes of the files have: what the checkpoint's author chose."""
    sizes: dict[str, int] = {}
    for tensor in files.tensors:
        if tensor.dtype in _FLOATS:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    return max(sizes, key=lambda name: (sizes[name], name), default=None)


def as_torch_dtype(name: str) -> torch.dtype:
    """`torch.bfloat16` for "bfloat16"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _linears(
    model: nn.Module,
    blocks: tuple[str, ...],
    keys: KeyMap,
    kept: Mapping[str, str],
    experts: Mapping[str, ExpertSource] = MappingProxyType({}),
    own_names: Mapping[str, str] = MappingProxyType({}),
    shared: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    *,
    known: bool,
) -> Iterator[LinearInfo]:
    """Quantizable linears whose weight has a name in the files, or can have one; those of one weight are
    listed once."""
    later = {name for others in shared.values() for name in others}
    for block in blocks:
        for name, linear in all_linears(model.get_submodule(block)).items():
            full = f"{block}.{name}"
            expert = experts.get(full)
            if expert is not None and full not in kept:
                yield _expert_linear(block, expert, keys)
                continue
            others = shared.get(full, ())
            names = [f"{name}.weight" for name in (full, *others)]
            target = next((name for name in names if name in keys.origins), names[0])
            held, stored_as = _held(target, keys, own_names)
            if not held and not known:
                held = (target,)
            if not held or full in later or full in kept:
                continue
            rows, columns = shape(linear)
            yield LinearInfo(
                name=full,
                block=block,
                source_key=held[0],
                held_with=held[1:],
                stored_as=stored_as,
                also_at=others,
                in_features=columns,
                out_features=rows,
                bias=getattr(linear, "bias", None) is not None,
                transposed=isinstance(linear, Conv1D),
            )


def _held(target: str, keys: KeyMap, own_names: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """The tensors of the files that a weight is made of, and its own name where that is not the tensor's; ()
    where it has none."""
    source = keys.source_of(target)
    if source is None and target in own_names:
        return keys.origins[target].sources, own_names[target].removesuffix(".weight")
    return ((source,) if source is not None and source.endswith(".weight") else ()), ""


def _expert_linear(block: str, expert: ExpertSource, keys: KeyMap) -> LinearInfo:
    place, tensor = expert.place, expert.place.tensor
    outputs = tensor.outputs(place.role)
    held = None if place.bias_target is None else keys.source_of(place.bias_target)
    return LinearInfo(
        name=place.linear,
        block=block,
        source_key=expert.tensors[0],
        held_with=expert.tensors[1:],
        in_features=tensor.in_features,
        out_features=tensor.out_features // len(tensor.roles),
        bias=place.bias_target is not None,
        transposed=False,
        stored_as=expert.name,
        bias_cut=None if held is None else BiasCut(
            source_key=held, expert=place.expert, outputs=(outputs.start, outputs.stop, outputs.step)
        ),
    )  # fmt: skip


def _mismatches(model: nn.Module, files: ModelFiles, keys: KeyMap) -> Iterator[SourceProblem]:
    """Weights that are missing in the files, or have another shape there."""
    broken = {p.kind for p in files.problems} - READABLE
    if not files.tensors or broken:
        return  # the problems of the files come first
    for name in keys.missing:
        yield SourceProblem(
            "missing-weight", name, f"no tensor in the files is the model's {name}", "fetch the model again"
        )
    state = model.state_dict()
    by_name = {tensor.name: tensor for tensor in files.tensors}
    for target in sorted(keys.origins, key=natural_key):
        source = keys.source_of(target)
        if source is None or tuple(state[target].shape) == by_name[source].shape:
            continue
        found, wanted = list(by_name[source].shape), list(state[target].shape)
        yield SourceProblem(
            "shape-mismatch",
            source,
            f"tensor {source} has shape {found}; config.json asks for {wanted}",
            "config.json and the weights belong to different models",
        )
