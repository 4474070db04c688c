"""A model without its weights: everything that can be decided before a weight is read.

The model is built on the meta device (a 70B-parameter one takes well under a second and no memory), its
blocks and linears are found, and every linear is matched with the tensor of the checkpoint that is its
weight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoModelForCausalLM
from transformers.initialization import meta_device_safe_creation_ops
from transformers.pytorch_utils import Conv1D

from gptq_cli.config import ModelRef
from gptq_cli.errors import ModelError
from gptq_cli.model.architecture import (
    first_line,
    load_config,
    quant_method,
    raise_import_failure,
    raw_config,
)
from gptq_cli.model.blocks import ROUTER_NAMES, find_blocks, find_linears, is_linear, is_router, shape
from gptq_cli.model.conversion import Conversion, KeyMap, natural_key, tied_groups
from gptq_cli.model.facts import dtype_name
from gptq_cli.model.quiet import quiet_libraries
from gptq_cli.model.source import READABLE, ModelFiles, SourceProblem
from gptq_cli.model.trace import Trace, trace
from gptq_cli.placement.names import fold, leaf

_MODULES_LIMIT = 50_000
"""Modules of any model, beside 3 for each tensor of its files. The largest models have 100,000 modules, and
as many tensors."""
_FLOATS = {"float16", "bfloat16", "float32", "float64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearInfo:
    """One linear that will be quantized."""

    name: str
    """In the model: `transformer.h.0.attn.c_attn`."""
    block: str
    source_key: str
    """The checkpoint's tensor that is its weight: `h.0.attn.c_attn.weight`."""
    in_features: int
    """K."""
    out_features: int
    """N."""
    bias: bool
    transposed: bool
    """Conv1D: the weight is stored (K, N)."""

    @property
    def source_name(self) -> str:
        """The linear's own name in the checkpoint, used for its `qweight` and the other packed tensors."""
        return self.source_key.removesuffix(".weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseInfo:
    """Modules that keep their weights, folded over the blocks: `model.layers.*.input_layernorm`."""

    name: str
    kind: str
    """Class name."""
    reason: str
    """embedding | head | fused experts | router | tied | read, not called | converted at load |
    outside the blocks | vector | other, or one of `results.kept`"""
    modules: int
    """Number of modules under the folded name."""
    parameters: int
    """Of all of them together; a tied tensor counts once."""
    share: float
    """Part of the model's parameters, 0 to 1."""


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
    """The `quant_method` that config.json names."""
    keys: KeyMap
    tied: tuple[tuple[str, ...], ...]
    parameters: int
    """Number of parameters; tied ones count once."""
    problems: tuple[SourceProblem, ...]
    """Of the files, and of files and model together: weights that are missing or have the wrong shape."""
    kept: Mapping[str, str]
    """Linears of the blocks that stay dense -> why."""
    by_module: tuple[LinearInfo, ...] = ()
    """Those of them that `--module` names, see `model.selection`."""
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

    def linears_of(self, block: str) -> tuple[LinearInfo, ...]:
        """The linears of one block in module order."""
        return tuple(linear for linear in self.linears if linear.block == block)


def open_skeleton(files: ModelFiles, ref: ModelRef) -> Skeleton:
    """Build the model of `files` on the meta device and find its blocks and linears.

    Raises `ModelError`: remote code without permission, not a causal language model, no blocks.
    """
    raw = raw_config(files)
    config = load_config(files, ref)
    already = quant_method(raw)
    dtype = _choose_dtype(config, files, ref)
    model = build_meta(config, ref, dtype, tensors=len(files.tensors))
    prefix, blocks = find_blocks(model)
    conversion = Conversion(model)
    keys = conversion.map(tensor.name for tensor in files.tensors)
    tied = tied_groups(model)
    candidates = _candidates(model, blocks)
    traced = trace(model, candidates)
    kept = _kept_dense(traced, candidates, tied)
    linears = tuple(_linears(model, blocks, keys, kept, known=bool(files.tensors)))
    return Skeleton(
        config=config,
        model=model,
        files=files,
        ref=ref,
        blocks_prefix=prefix,
        blocks=blocks,
        linears=linears,
        dense=fold_dense(model, linears, blocks, kept),
        trace=traced,
        dtype=dtype,
        already_quantized=already,
        keys=keys,
        tied=tied,
        parameters=sum(p.numel() for p in model.parameters()),
        problems=(*files.problems, *_mismatches(model, files, keys)),
        kept=kept,
    )


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


def build_meta(config: Any, ref: ModelRef, dtype: torch.dtype, *, tensors: int = 0) -> Any:
    """The model of `config` on the meta device, parameters in `dtype`; a quantization config is ignored.

    `tensors`: how many the files hold. A config that asks for many times more modules is refused
    (`ModelError`) before they fill the memory.
    """
    try:
        with quiet_libraries(), torch.device("meta"), meta_device_safe_creation_ops(), _counted(ref, tensors):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=ref.trust_remote_code
            )
    except ModelError:
        raise
    except Exception as error:
        raise_import_failure(error)
        raise ModelError(
            f"the architecture of {ref.model} cannot be built: {first_line(error)}",
            hint="check config.json, and that the packages which the architecture needs are installed",
        ) from error
    return model.eval().requires_grad_(False)


def _candidates(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, str]:
    """Every linear of the blocks -> its block."""
    return {f"{block}.{name}": block for block in blocks for name in find_linears(model.get_submodule(block))}


@contextmanager
def _counted(ref: ModelRef, tensors: int) -> Iterator[None]:
    """Stop building a model that has far more modules than the files could fill."""
    limit = _MODULES_LIMIT + 3 * tensors
    maker = threading.get_ident()
    count = 0

    def registered(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += threading.get_ident() == maker
        if count > limit:
            raise ModelError(
                f"config.json of {ref.model} asks for more than {limit} modules; "
                f"the files hold {tensors} tensors",
                hint="compare config.json with the one that the model was published with",
            )

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _kept_dense(
    traced: Trace, candidates: Iterable[str], tied: tuple[tuple[str, ...], ...]
) -> dict[str, str]:
    """Linears that stay dense -> why: their weight is shared with another module, or used without a call."""
    shared = {name.removesuffix(".weight") for group in tied for name in group}
    kept = dict.fromkeys(traced.read_not_called, "read, not called")
    return kept | {name: "tied" for name in candidates if name in shared}


def _linears(
    model: nn.Module, blocks: tuple[str, ...], keys: KeyMap, kept: Mapping[str, str], *, known: bool
) -> Iterator[LinearInfo]:
    """Quantizable linears with a tensor of their own in the files; a module shared by two blocks is listed
    once."""
    seen: set[int] = set()
    for block in blocks:
        for name, linear in find_linears(model.get_submodule(block)).items():
            full = f"{block}.{name}"
            source = keys.source_of(f"{full}.weight")
            if source is None and not known:
                source = f"{full}.weight"
            if source is None or not source.endswith(".weight") or id(linear) in seen or full in kept:
                continue
            seen.add(id(linear))
            rows, columns = shape(linear)
            yield LinearInfo(
                name=full,
                block=block,
                source_key=source,
                in_features=columns,
                out_features=rows,
                bias=getattr(linear, "bias", None) is not None,
                transposed=isinstance(linear, Conv1D),
            )


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


def fold_dense(
    model: Any, linears: tuple[LinearInfo, ...], blocks: tuple[str, ...], kept: Mapping[str, str]
) -> tuple[DenseInfo, ...]:
    """The modules with weights that are not among `linears`, folded over the blocks, with the reason."""
    quantized = {linear.name for linear in linears}
    head = model.get_output_embeddings()
    total = max(1, sum(p.numel() for p in model.parameters()))
    inside = tuple(f"{block}." for block in blocks)
    counted: set[int] = set()
    folded: dict[tuple[str, str], tuple[str, int, int]] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if name in quantized:
            counted.update(id(p) for p in own.values())
            continue
        size = sum(p.numel() for p in own.values() if id(p) not in counted)
        counted.update(id(p) for p in own.values())
        reason = kept.get(name) or _reason(name, module, head, name.startswith(inside))
        key = (fold(name), reason)
        kind, modules, parameters = folded.get(key, (type(module).__name__, 0, 0))
        folded[key] = (kind, modules + 1, parameters + size)
    return tuple(
        DenseInfo(
            name=name,
            kind=kind,
            reason=reason,
            modules=modules,
            parameters=parameters,
            share=parameters / total,
        )
        for (name, reason), (kind, modules, parameters) in folded.items()
    )


def _reason(name: str, module: nn.Module, head: nn.Module | None, in_block: bool) -> str:
    dimensions = [p.ndim for p in module.parameters(recurse=False)]
    if module is head:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if in_block and 3 in dimensions and not isinstance(module, nn.Conv1d):
        return "fused experts"
    if in_block and leaf(name) in ROUTER_NAMES:
        return "router"
    if max(dimensions) < 2:
        return "vector"
    if is_linear(module):
        if is_router(name, module):
            return "router"
        return "converted at load" if in_block else "outside the blocks"
    return "other"
