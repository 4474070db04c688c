"""Decoder blocks and the linears in them: found by structure, never by a table of architectures.

The blocks are the `ModuleList` of the decoder whose items hold the most weights of linears. A linear is an
`nn.Linear`, a Transformers `Conv1D` (the same thing stored transposed), or a subclass of `nn.Linear` that is
shown, once per class on a tiny instance, to compute the same function. Everything else stays dense.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import ModelError
from gptq_cli.model.text_part import text_modules
from gptq_cli.placement.names import leaf

ROUTER_NAMES = frozenset({"router", "gate", "shared_expert_gate", "gate_network", "wg"})
"""What routers are often called: a guess, where no forward shows which linears choose (`model.dataflow`)."""


@cache
def _computes_linear(kind: type[nn.Module]) -> bool:
    """Whether a subclass of `nn.Linear` computes x Wᵀ + b."""
    if kind is NonDynamicallyQuantizableLinear:
        return False  # its owner, nn.MultiheadAttention, reads the weight and never calls it
    if kind is nn.Linear or kind.forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.device("cpu"), torch.no_grad():
            probe = kind(8, 4, bias=True)
            assert isinstance(probe, nn.Linear)
            for parameter in probe.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            x = torch.randn(2, 3, 8, generator=generator)
            y = probe(x)
            return bool(torch.allclose(y, nn.functional.linear(x, probe.weight, probe.bias), atol=1e-5))
    except Exception as error:  # whatever foreign code raises: it is not a plain linear
        if is_out_of_memory(error):
            raise
        return False


def is_linear(module: nn.Module) -> bool:
    """True for a module whose weight can be quantized: 2-D, and used as x Wᵀ + b."""
    if isinstance(module, Conv1D):
        return True
    return isinstance(module, nn.Linear) and _computes_linear(type(module))  # type: ignore[arg-type]


def shape(linear: nn.Module) -> tuple[int, int]:
    """(N, K) = (out_features, in_features)."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def all_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Every linear of one block by its name inside it, in module order."""
    return {name: module for name, module in block.named_modules() if name and is_linear(module)}


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The same without gates of one output, and without what is called like a router: for a block alone, when
    no forward of its model has shown which linears choose."""
    return {
        name: module
        for name, module in all_linears(block).items()
        if shape(module)[0] > 1 and leaf(name) not in ROUTER_NAMES
    }


def find_blocks(model: nn.Module, left_out: Collection[str] = ()) -> tuple[str, tuple[str, ...]]:
    """The prefix of the decoder's blocks and their names: ("model.layers", ("model.layers.0", …)).

    `left_out`: prefixes of lists that are not the decoder's.
    Raises `ModelError` where no ModuleList holds a linear.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for prefix, module in _decoder_lists(model):
        if prefix in left_out:
            continue
        weight = sum(p.numel() for p in _block_parameters(module))
        if best is None or weight > best[0]:
            best = (weight, prefix, module)
    if best is None or best[0] == 0:
        raise ModelError(
            f"{type(model).__name__} has no list of decoder blocks with linears",
            hint="only decoder-only models whose blocks are a torch.nn.ModuleList can be quantized",
        )
    _, prefix, blocks = best
    return prefix, tuple(f"{prefix}.{index}" for index in range(len(blocks)))


def _decoder_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """All ModuleLists under the decoder; under the whole model where no decoder is named or it has none."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    inside = {id(m) for _, m in text_modules(model)}
    yield from [(n, m) for n, m in lists if id(m) in inside] or lists


def _block_parameters(blocks: nn.ModuleList) -> Iterator[nn.Parameter]:
    for module in blocks.modules():
        if is_linear(module):
            yield from module.parameters(recurse=False)
        else:
            yield from (p for p in module.parameters(recurse=False) if p.ndim == 3)


def weight_matrix(linear: nn.Module) -> Tensor:
    """The weight as (N, K): the parameter itself for a linear, a transposed view for a Conv1D. No
    gradient."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return weight.t() if isinstance(linear, Conv1D) else weight


def as_parameter(linear: nn.Module, W: Tensor) -> Tensor:  # noqa: N803 - the paper's letter; (N, K)
    """`W` as the linear's own parameter would hold it: transposed for a Conv1D."""
    return W.t() if isinstance(linear, Conv1D) else W


def assign(linear: nn.Module, W: Tensor) -> None:  # noqa: N803 - the paper's letter; (N, K)
    """Overwrite the linear's weight in place with `W` (N, K), cast to its dtype and device."""
    weight_matrix(linear).copy_(W)
