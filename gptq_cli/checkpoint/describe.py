"""A quantized checkpoint described by numbers, packed linears with their size in the files."""

from __future__ import annotations

from dataclasses import replace

from gptq_cli.checkpoint.checkpoint import QuantizedCheckpoint
from gptq_cli.checkpoint.format import PARTS
from gptq_cli.model.conversion import tied_groups
from gptq_cli.model.describe import _tensors, module_names
from gptq_cli.model.facts import ModelFacts, dtype_name
from gptq_cli.model.positions import stated_positions
from gptq_cli.model.trace import trace


def checkpoint_facts(checkpoint: QuantizedCheckpoint) -> ModelFacts:
    """A quantized checkpoint described by numbers, packed linears with their size in the files."""
    model, config = checkpoint.model, checkpoint.config.get_text_config()
    traced = trace(model, {})
    stored = {tensor.name: tensor.size_bytes for tensor in checkpoint.tensors}
    packed = {
        f"{info.name}.weight": sum(stored.get(f"{info.source_name}.{part}", 0) for part in PARTS)
        for info in checkpoint.linears
    }
    for info in checkpoint.experts:
        size = sum(stored.get(f"{info.source_name}.{part}", 0) for part in PARTS)
        packed[info.fused_into or ""] = packed.get(info.fused_into or "", 0) + size
    return ModelFacts(
        model=str(checkpoint.directory),
        architecture=type(model).__name__,
        dtype=dtype_name(checkpoint.dtype),
        hidden_size=int(config.hidden_size),
        vocab_size=int(getattr(config, "vocab_size", 0) or 0),
        max_positions=stated_positions(config),
        blocks=checkpoint.blocks,
        modules=tuple(module_names(model)),
        order=traced.order if traced.complete else (),
        untraced=traced.problem,
        tensors=tuple(
            replace(fact, size_bytes=packed.get(fact.name, fact.size_bytes)) for fact in _tensors(model)
        ),
        tied=tied_groups(model),
        tensor_files_bytes=checkpoint.packed_bytes,
    )
