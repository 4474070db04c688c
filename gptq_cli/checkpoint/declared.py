"""What the config of a checkpoint says about its linears, for readers that do not look at the tensors.

vLLM, SGLang and GPTQModel read `dynamic`; Transformers, through Optimum, reads `modules_in_block_to_quantize`
and `block_name_to_quantize` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

from torch import nn

from gptq_cli.checkpoint.dynamic import Override, render
from gptq_cli.checkpoint.layout import rewritten
from gptq_cli.model.blocks import is_linear
from gptq_cli.model.skeleton import LinearInfo, Skeleton
from gptq_cli.model.text_part import output_head
from gptq_cli.placement.names import owner
from gptq_cli.targets.names import finds_blocks


def declared_dynamic(
    skeleton: Skeleton, changed: Mapping[str, Mapping[str, int | bool]] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """`dynamic`: everything with matrices that stays dense, and what is `changed`: fields by the names of
    linears in the files."""
    dense = dict(_dense_modules(skeleton))
    aliases = {source: name for source, name in dense.items() if _differs(source, name)}
    aliases |= {x.source_name: x.name for x in skeleton.packed if _differs(x.source_name, x.name)}
    overrides = {
        name: Override(**fields)  # type: ignore[arg-type]  # by name
        for name, fields in changed.items()
    }
    return render({x.source_name: overrides.get(x.source_name) for x in skeleton.packed}, dense, aliases)


def modules_in_block(skeleton: Skeleton) -> tuple[str, ...]:
    """`modules_in_block_to_quantize`, where some linear of a block stays dense; otherwise ().

    Optimum looks at the ends of names, and vLLM for the listed name anywhere in its own. So names inside a
    block are listed only where nothing dense has such a name, in a vision tower or a draft layer for example.
    Otherwise full names are listed, or nothing where that would be no better; or where there are experts,
    which Transformers does not read.
    """
    quantized = {linear.name for linear in skeleton.linears} | skeleton.shared
    partly = any(
        is_linear(module) and f"{block}.{name}" not in quantized
        for block in skeleton.blocks
        for name, module in skeleton.model.get_submodule(block).named_modules()
    )
    if not partly:
        return ()
    packed = {source for x in skeleton.linears for source in x.sources}
    dense = {owner(t.name) for t in skeleton.files.tensors if len(t.shape) > 1 and t.name not in packed}
    dense |= {name for _, name in _dense_modules(skeleton)}
    short = tuple(dict.fromkeys(map(_inside_block, skeleton.linears)))
    if not _names_one_of(short, dense):
        return short
    full = tuple(x.source_name for x in skeleton.linears)
    experts = any(sum(map(str.isdecimal, name.split("."))) > 1 for name in full)
    return () if experts or _names_one_of(full, dense) else full


def _inside_block(linear: LinearInfo) -> str:
    """The linear's name inside its block; that of an expert as the files call it."""
    inside = linear.name.removeprefix(f"{linear.block}.")
    _, found, after = linear.stored_as.partition(f".{linear.block.rpartition('.')[2]}.")
    return after if found else inside


def block_name(skeleton: Skeleton) -> str:
    """`block_name_to_quantize`, where Optimum would not find the blocks without it; otherwise ""."""
    names = (name for name, _ in skeleton.model.named_modules())
    return "" if finds_blocks(skeleton.blocks_prefix, names) else skeleton.blocks_prefix


def _names_one_of(listed: Sequence[str], dense: Iterable[str]) -> bool:
    return any(name in other for other in dense for name in listed)


def _dense_modules(skeleton: Skeleton) -> Iterator[tuple[str, str]]:
    """(name in the files, name in the model) of the modules with matrices that stay dense: the linears of
    towers, routers, experts, convolutions; and of tensors that the model has no place for, as of draft
    layers.

    Embeddings and the head are dense wherever nothing is said.
    """
    model = skeleton.model
    quantized = {linear.name for linear in skeleton.linears} | skeleton.shared
    fused = {module.name for module in skeleton.experts.experts}
    head = output_head(model)
    own_names = rewritten(skeleton)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if name in quantized or name in fused or module is head or isinstance(module, nn.Embedding):
            continue
        if all(parameter.ndim < 2 for parameter in own.values()):
            continue
        sources = [
            source
            for target in (f"{name}.{leaf}" for leaf in own)
            if (origin := skeleton.keys.origins.get(target)) is not None
            for source in ((own_names[target],) if target in own_names else origin.sources)
        ]
        yield (_common_parent(sources) if sources else name), name
    yield from _dense_experts(skeleton, quantized)
    unexpected = set(skeleton.keys.unexpected)
    for tensor in skeleton.files.tensors:
        if tensor.name in unexpected and len(tensor.shape) > 1:
            yield owner(tensor.name), owner(tensor.name)


def _dense_experts(skeleton: Skeleton, quantized: Set[str]) -> Iterator[tuple[str, str]]:
    """The parameters of experts that stay dense though they could be quantized."""
    for module in skeleton.experts.experts:
        for tensor in module.tensors:
            name = f"{module.name}.{tensor.leaf}"
            origin = skeleton.keys.origins.get(name)
            if origin is not None and not any(x in quantized for x in module.linears_of(tensor)):
                yield from ((source.removesuffix(".weight"), name) for source in origin.sources)


def _common_parent(names: Sequence[str]) -> str:
    """The dotted components that all names begin with, without their last one."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ".".join(parts[0][:shared])


def _differs(source: str, name: str) -> bool:
    """Whether the names differ from the block on, where patterns begin, and not only before it."""
    return _inside(source) != _inside(name)


def _inside(name: str) -> list[str]:
    words = name.split(".")
    return words[next((place for place, word in enumerate(words) if word.isdecimal()), 0) :]
