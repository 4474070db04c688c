"""Packed linears in the places of fused experts.

`model.expert_linears` has the model's own forward of a module of experts call linears in place of products
with slices of its 3-D parameters. When a checkpoint is opened, packed linears take the places of these, and
the parameters are dropped. What remains of the module is its own: routing, activation, biases.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptq_cli.checkpoint.checkpoint import PackedInfo, QuantizedCheckpoint
from gptq_cli.errors import CheckpointError, ModelError
from gptq_cli.model.expert_linears import ExpertLinear, drop_parameters

_OTHERS = "vLLM and GPTQModel read more kinds of quantized experts"


def expert_linear(checkpoint: QuantizedCheckpoint, info: PackedInfo) -> ExpertLinear:
    """The linear that the packed expert `info` replaces. Raises `CheckpointError` where there is none."""
    try:
        linear = checkpoint.model.get_submodule(info.name)
    except AttributeError:
        linear = None
    if not isinstance(linear, ExpertLinear):
        why = checkpoint.dense_experts.get(
            info.fused_into or "", "they are not experts that are computed singly"
        )
        raise CheckpointError(
            f"tensor {info.source_name}.qweight goes into {info.fused_into}, which is not supported: {why}",
            hint=_OTHERS,
        )
    return linear


def drop_packed(name: str, module: nn.Module) -> None:
    """Drop the parameters of the experts `name` whose linears are packed now. Raises `CheckpointError` for
    one that is packed in part."""
    try:
        drop_parameters(module)
    except ModelError as error:
        raise CheckpointError(
            f"{name}: {error.message}", hint="GPTQModel reads partly quantized experts"
        ) from error


def put_bias(linear: ExpertLinear, bias: Tensor) -> None:
    """Write the bias (N,) of one expert to its place in the parameter of all experts, on its device."""
    assert linear.tensor.bias is not None
    parameters = linear.owner._parameters
    merged = parameters[linear.tensor.bias]
    assert merged is not None
    if merged.is_meta:
        merged = nn.Parameter(torch.zeros_like(merged, device=bias.device), requires_grad=False)
        parameters[linear.tensor.bias] = merged
    merged.detach()[linear.expert][linear.tensor.outputs(linear.role)].copy_(bias)
