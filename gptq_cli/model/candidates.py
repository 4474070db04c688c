"""The linears of a model's blocks, before any settings: which there are, which of them are one, which stay
dense, and what parts of converted tensors are called."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from torch import nn

from gptq_cli.model.blocks import ROUTER_NAMES, all_linears, shape
from gptq_cli.model.conversion import Conversion, KeyMap
from gptq_cli.model.experts import FoundExperts
from gptq_cli.model.trace import Trace
from gptq_cli.placement.names import leaf


def candidates_of(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, str]:
    """Every linear of the blocks -> its block."""
    return {f"{block}.{name}": block for block in blocks for name in all_linears(model.get_submodule(block))}


def shared_linears(
    tied: tuple[tuple[str, ...], ...], candidates: Collection[str], keys: KeyMap, traced: Trace
) -> dict[str, tuple[str, ...]]:
    """The linears of one weight, the first that runs -> the others: all of them in blocks, and the files hold
    one tensor for them. Where they hold several, these may differ."""
    order = {f"{name}.weight": (name in traced.idle, place) for place, name in enumerate(candidates)}
    groups = [sorted(group, key=lambda name: order[name]) for group in tied if order.keys() >= {*group}]
    return {
        first.removesuffix(".weight"): tuple(name.removesuffix(".weight") for name in others)
        for first, *others in groups
        if sum(name in keys.origins for name in (first, *others)) < 2
    }


def kept_dense(
    model: nn.Module,
    traced: Trace,
    candidates: Collection[str],
    tied: tuple[tuple[str, ...], ...],
    shared: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> dict[str, str]:
    """Linears that stay dense -> why: their weight is that of a module which is no linear of a block, or used
    without a call, or they choose.

    Where the trace is not complete, the name of a router is taken for one.
    """
    together = {name for first, others in shared.items() for name in (first, *others)}
    alone = {name.removesuffix(".weight") for group in tied for name in group} - together
    kept = dict.fromkeys(traced.choosing, "router")
    for name in candidates:
        if shape(model.get_submodule(name))[0] == 1 or (not traced.complete and leaf(name) in ROUTER_NAMES):
            kept[name] = "router"
    kept |= dict.fromkeys(traced.read_not_called, "read, not called")
    for first, others in shared.items():  # one weight: dense in one place is dense in all
        why = next((kept[name] for name in (first, *others) if name in kept), None)
        kept |= {} if why is None else dict.fromkeys((first, *others), why)
    return kept | {name: "tied" for name in candidates if name in alone}


def own_names_of(
    conversion: Conversion, keys: KeyMap, linears: Collection[str], experts: FoundExperts
) -> dict[str, str]:
    """`Skeleton.own_names` of everything that is computed together with a weight or a bias of `linears`, or
    with a parameter of `experts`."""
    names: dict[str, str] = {}
    targets = [f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias")]
    targets += [f"{module.name}.{tensor.leaf}" for module in experts.experts for tensor in module.tensors]
    for target in targets:
        origin = keys.origins.get(target)
        if origin is not None and origin.converted and target not in names:
            names |= conversion.own_names(origin, keys)
    for linear in linears:  # a bias that is a tensor of the files follows its weight
        name = names.get(f"{linear}.weight", "").removesuffix("weight") + "bias"
        source = keys.source_of(f"{linear}.bias")
        if f"{linear}.weight" in names and source not in (None, name):
            names[f"{linear}.bias"] = name
    return names
