"""Which module runs when, and which linears read the same input: one forward without data.

A few tokens go through the model on the meta device. Shapes are computed and values are not, so a 70B model
is traced in a second and in no memory. Where code asks for a value (is there padding, which expert was
chosen) it gets the plainest answer: zero, False, none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_cli.model.skeleton import LinearInfo

_TRACE_TOKENS = 8


class _WithoutData(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its hook untyped
    """Answers the questions that tensors without data cannot."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return False if first.dtype == torch.bool else 0
            if func is torch.ops.aten.nonzero.default:
                return first.new_empty((0, first.dim()), dtype=torch.long)
            if func is torch.ops.aten._grouped_mm.default:  # its shape check wants bfloat16 and alignment
                return first.new_empty((*first.shape[:-1], args[1].shape[-1]))
        return func(*args, **(kwargs or {}))


def trace(
    model: Any, linears: Sequence[LinearInfo], blocks: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, int], frozenset[str]]:
    """(modules in the order of their first call, stage number of each linear inside its block, linears that
    did not run: experts that tokens choose).

    Linears that read the same tensor are one stage. Where a model cannot be run without data, the order is
    () and the linears with one parent and one K count as a stage, which overestimates memory if anything.
    """
    order: dict[str, None] = {}
    reads: dict[str, Tensor] = {}
    wanted = {info.name for info in linears}
    handles = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            order.setdefault(name)
            if name in wanted and name not in reads:
                inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                if inputs:
                    reads[name] = inputs[0]

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(note(name), with_kwargs=True))
    try:
        with torch.no_grad(), _WithoutData():  # type: ignore[no-untyped-call]
            ids = torch.zeros(1, _TRACE_TOKENS, dtype=torch.long, device="meta")
            model(input_ids=ids, use_cache=False)
    except Exception:  # noqa: BLE001 - whatever a forward without data raises: the trace is a refinement
        return (), _stages_by_shape(linears), frozenset()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(order), _stages_by_input(linears, reads, blocks), frozenset(wanted - reads.keys())


def _stages_by_input(
    linears: Sequence[LinearInfo], reads: Mapping[str, Tensor], blocks: Sequence[str]
) -> dict[str, int]:
    """Numbers in order of execution; a linear that never ran is a stage of its own, after the others."""
    owner = {info.name: info.block for info in linears}
    known: dict[str, list[Tensor]] = {block: [] for block in blocks}
    stages: dict[str, int] = {}
    for name, x in reads.items():
        inputs = known[owner[name]]
        same = next((number for number, other in enumerate(inputs) if _same_input(other, x)), None)
        stages[name] = len(inputs) if same is None else same
        if same is None:
            inputs.append(x)
    idle = {block: len(inputs) for block, inputs in known.items()}
    for name, block in owner.items():
        if name not in stages:
            stages[name] = idle[block]
            idle[block] += 1
    return stages


def _same_input(a: Tensor, b: Tensor) -> bool:
    """One tensor, or one view of one storage; on meta every address is 0, so storages are compared."""
    if a is b:
        return True
    same_storage = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return (
        same_storage
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
    )


def _stages_by_shape(linears: Sequence[LinearInfo]) -> dict[str, int]:
    stages: dict[str, int] = {}
    numbers: dict[tuple[str, str, int], int] = {}
    counts: dict[str, int] = {}
    for info in linears:
        key = (info.block, info.name.rpartition(".")[0], info.in_features)
        if key not in numbers:
            numbers[key] = counts.get(info.block, 0)
            counts[info.block] = numbers[key] + 1
        stages[info.name] = numbers[key]
    return stages
