"""An opened checkpoint as the rules of its readers see it."""

from __future__ import annotations

from pathlib import Path

from gptq_cli.checkpoint.checkpoint import PackedInfo, QuantizedCheckpoint
from gptq_cli.model.blocks import is_linear
from gptq_cli.model.conversion import tied_groups
from gptq_cli.model.expert_linears import ExpertLinear, is_interleaved
from gptq_cli.model.facts import dtype_name
from gptq_cli.model.parallel import find_splits, head_counts
from gptq_cli.model.text_part import output_head
from gptq_cli.placement.names import owner
from gptq_cli.targets.facts import TargetFacts, TargetLinear
from gptq_cli.targets.names import finds_blocks


def target_facts(checkpoint: QuantizedCheckpoint, *, trivial_g_idx: bool = True, tp: int = 1) -> TargetFacts:
    """The facts that target rules ask about, of an opened checkpoint."""
    form = checkpoint.format
    packed = (*checkpoint.linears, *checkpoint.experts)
    scales = {t.dtype for t in checkpoint.tensors if t.name.endswith(".scales")}
    splits = find_splits(checkpoint.config, ((x.name, x.in_features, x.out_features) for x in packed))
    return TargetFacts(
        bits=form.base.bits,
        group_size=form.base.group_size,
        sym=form.base.sym,
        desc_act=form.base.desc_act,
        checkpoint_format=form.base.checkpoint_format,
        dtype=dtype_name(checkpoint.dtype),
        linears=tuple(
            TargetLinear(
                name=info.source_name,
                in_features=info.in_features,
                out_features=info.out_features,
                bits=info.format.bits,
                group_size=info.format.group_size,
                sym=info.format.sym,
                desc_act=info.format.desc_act,
                split=splits[info.name],
                interleaved=is_interleaved(checkpoint.model.get_submodule(info.name)),
            )
            for info in packed
        ),
        dense=_all_dense_linears(checkpoint),
        dense_experts=_dense_experts(checkpoint),
        shared=_shared(checkpoint),
        scale_dtype=min(scales - {"float16"}, default="float16"),
        lm_head=head_of(checkpoint) is not None,
        modules_listed=bool(checkpoint.config_dict.get("modules_in_block_to_quantize")),
        blocks_found=_blocks_found(checkpoint),
        trivial_g_idx=trivial_g_idx,
        in_config_json=_says_config_json(checkpoint.directory),
        heads=head_counts(checkpoint.config),
        hidden_size=int(getattr(checkpoint.config.get_text_config(), "hidden_size", 0) or 0),
        tp=tp,
    )


def head_of(checkpoint: QuantizedCheckpoint) -> PackedInfo | None:
    """The output head where it is quantized."""
    name = head_name(checkpoint)
    return next((info for info in checkpoint.linears if info.name == name), None)


def head_name(checkpoint: QuantizedCheckpoint) -> str | None:
    """Name of the output head in the model; None where it has none."""
    head = output_head(checkpoint.model)
    return next((name for name, module in checkpoint.model.named_modules() if module is head), None)


def _all_dense_linears(checkpoint: QuantizedCheckpoint) -> tuple[str, ...]:
    """Names in the files of the linears of the blocks that are not packed, routers among them."""
    packed = {info.name for info in checkpoint.linears} | {*_shared(checkpoint)}
    return tuple(
        (checkpoint.keys.source_of(f"{full}.weight") or f"{full}.weight").removesuffix(".weight")
        for block in checkpoint.blocks
        for name, module in checkpoint.model.get_submodule(block).named_modules()
        if is_linear(module) and not isinstance(module, ExpertLinear)
        if (full := f"{block}.{name}") not in packed
    )


def _shared(checkpoint: QuantizedCheckpoint) -> tuple[str, ...]:
    """Linears of the blocks whose weight is that of a packed one."""
    packed = {f"{info.name}.weight" for info in checkpoint.linears}
    return tuple(
        owner(name)
        for group in tied_groups(checkpoint.model)
        if packed & {*group}
        for name in group
        if name not in packed and name not in checkpoint.keys.origins
    )


def _dense_experts(checkpoint: QuantizedCheckpoint) -> tuple[str, ...]:
    """Experts that are not quantized: linears that are not packed, and tensors that hold no linears."""
    packed = {info.name for info in checkpoint.experts}
    linears = (
        f"{block}.{name}"
        for block in checkpoint.blocks
        for name, module in checkpoint.model.get_submodule(block).named_modules()
        if isinstance(module, ExpertLinear)
    )
    return (*(name for name in linears if name not in packed), *checkpoint.dense_experts)


def _blocks_found(checkpoint: QuantizedCheckpoint) -> bool:
    prefix = checkpoint.blocks[0].rpartition(".")[0] if checkpoint.blocks else ""
    named = checkpoint.config_dict.get("block_name_to_quantize")
    return named == prefix if named else finds_blocks(prefix, dict(checkpoint.model.named_modules()))


def _says_config_json(directory: Path) -> bool:
    path = directory / "config.json"
    return path.is_file() and '"quantization_config"' in path.read_text(encoding="utf-8", errors="replace")
