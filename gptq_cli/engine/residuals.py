"""What the output of a linear is added to.

The last linear of an attention or an MLP does not put out what the next block reads: its output is added to
the residual stream, and that sum is read. In a model whose earlier blocks are quantized the residual has an
error of its own, part of which follows from the linear's input, so the linear can be asked to make up for
it: see `gptq.goal`. Which tensor is the residual is found by looking, not by a table of architectures: in
one sample's forward, the tensor a for which a + output is exactly something that is read later. Where the
output is normed or scaled before it is added, there is no such tensor, and the linear is asked for less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.engine.calls import BlockCall
from gptq_cli.engine.stages import Stage
from gptq_cli.model.flow import tensors_in

BLOCK_INPUT = ""
"""In place of a module's name: the hidden states that enter the block."""


def find_residuals(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    stages: Sequence[Stage],
    call: BlockCall,
    hidden: Tensor,  # (1, seq_len, hidden_size)
) -> dict[str, str]:
    """Linear -> the module whose first input is the residual, or BLOCK_INPUT.

    Only linears that run once and alone in their stage, on inputs that are there before they run.
    """
    alone = {stage.leader for stage in stages if stage.once and len(stage.linears) == 1}
    wanted = {linears[name]: name for name in alone}
    width = hidden.shape[-1]
    seen: list[tuple[str, Tensor]] = [(BLOCK_INPUT, hidden)]
    outputs: dict[str, tuple[int, Tensor]] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape[-1:] == (width,):
                seen.append((name, args[0].clone()))

        return hook

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.shape[-1] == width:
            outputs[wanted[module]] = (len(seen), output.clone())

    handles = [module.register_forward_hook(after) for module in wanted]
    handles += [
        module.register_forward_pre_hook(before(name))
        for name, module in block.named_modules()
        if name and module not in wanted
    ]
    try:
        with torch.no_grad():
            result = call.rehearse(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    residuals = {}
    for name, (position, output) in outputs.items():
        later = [x for _, x in seen[position:]] + list(tensors_in(result))
        for source, x in seen[:position]:
            if x.numel() == output.numel() and any(_is_sum(total, x, output) for total in later):
                residuals[name] = source
                break
    return residuals


def _is_sum(total: Tensor, a: Tensor, b: Tensor) -> bool:
    return total.numel() == a.numel() and torch.equal(total.flatten(), a.flatten() + b.flatten())
