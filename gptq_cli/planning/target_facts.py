"""A planned checkpoint in the words of the rules about its readers."""

from __future__ import annotations

from dataclasses import replace

from gptq_cli.config import QuantizeConfig
from gptq_cli.model.facts import LinearFact, ModelFacts
from gptq_cli.placement.names import fold
from gptq_cli.targets.facts import TargetFacts, TargetLinear, is_expert


def target_facts(model: ModelFacts, config: QuantizeConfig, tp: int = 1) -> TargetFacts:
    """The checkpoint that would be written, as a reader would find it.

    `config` may be another than that of the job: a change that is tried. Without settings by module the
    linears that they leave dense are quantized.
    """
    head = model.head if config.quantize_head else None
    by_module = () if config.modules else model.by_module
    linears = (*model.linears, *by_module, *((head,) if head is not None else ()))
    config = config.for_model((), head.name if head is not None else None)
    packed = {linear.name for linear in linears}
    return TargetFacts(
        bits=config.bits,
        group_size=config.group_columns,
        sym=config.sym and all(config.of_linear(linear.name).sym for linear in linears),
        desc_act=config.desc_act,
        checkpoint_format=config.checkpoint_format,
        dtype=model.dtype,
        linears=tuple(
            TargetLinear(
                name=linear.name,
                in_features=linear.in_features,
                out_features=linear.out_features,
                bits=own.bits,
                group_size=own.group_columns,
                sym=own.sym,
                desc_act=config.desc_act,
                split=linear.split,
                source_name=linear.source_name,
                interleaved=linear.interleaved,
            )
            for linear in linears
            for own in (config.of_linear(linear.name),)
        ),
        dense=tuple(name for name in model.dense_linears if name not in packed),
        dense_experts=tuple(stack.name for stack in model.fused),
        shared=model.shared,
        lm_head=head is not None,
        modules_listed=model.listed,
        heads=model.heads,
        hidden_size=model.hidden_size,
        tp=tp,
        trivial_g_idx=not config.desc_act,
    )


def with_few_experts(facts: ModelFacts) -> ModelFacts:
    """The same with one expert of each kind and block in place of all: there can be ten thousands, and many
    settings are tried."""
    kept: dict[object, LinearFact] = {}
    for linear in facts.linears:
        kind = (linear.block, fold(linear.name), linear.in_features, linear.out_features)
        kept.setdefault(kind if is_expert(linear.name) else linear.name, linear)
    return replace(facts, linears=tuple(kept.values()))
