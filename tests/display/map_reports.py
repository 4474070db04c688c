"""Synthetic map reports: one that fits on two cards with offload, one that is refused."""

from dataclasses import replace

from gptq_cli.placement.device import Device
from gptq_cli.placement.placement import DeviceBudget
from gptq_cli.results.map import DevicePlan, MapReport, QuantizePlan, StagePlan, TimeEstimate, TreeRow
from tests.display.events import GIB, MIB, OFFLOAD, REFUSED

CARD = DevicePlan(
    device="cuda:0",
    total_bytes=24 * GIB,
    free_bytes=23 * GIB,
    limit_bytes=20 * GIB,
    weights_bytes=int(7.5 * GIB),
    working_bytes=832 * MIB,
    hessian_bytes=784 * MIB,
    activation_bytes=1024 * MIB,
    packing_bytes=112 * MIB,
    baseline_bytes=500 * MIB,
)
SECOND = replace(CARD, device="cuda:1", weights_bytes=6 * GIB, activation_bytes=0)
HOST = DevicePlan(
    device="cpu",
    total_bytes=64 * GIB,
    free_bytes=60 * GIB,
    limit_bytes=60 * GIB,
    weights_bytes=1002 * MIB,
    working_bytes=0,
    hessian_bytes=0,
    activation_bytes=2 * GIB,
    packing_bytes=0,
    baseline_bytes=700 * MIB,
)


def row(
    path: str, depth: int, devices: tuple[str, ...], size: int, modules: int = 1, leaf: bool = True
) -> TreeRow:
    return TreeRow(
        name=path.rpartition(".")[2],
        path=path,
        depth=depth,
        devices=devices,
        size_bytes=size,
        modules=modules,
        parameters=size > 4096,
        leaf=leaf,
    )


TREE = (
    row("model", 0, ("cuda:0", "cuda:1"), 14 * GIB, leaf=False),
    row("model.embed_tokens", 1, ("cuda:0",), 1002 * MIB),
    row("model.layers", 1, ("cuda:0", "cuda:1"), 13 * GIB, leaf=False),
    row("model.layers.0-15", 2, ("cuda:0",), int(6.5 * GIB), 16),
    row("model.layers.16-31", 2, ("cuda:1",), int(6.5 * GIB), 16),
    row("model.norm", 1, ("cuda:1",), 8192),
    row("model.rotary_emb", 1, ("cuda:0",), 256),
    row("lm_head", 0, ("cpu",), 1002 * MIB),
)
STAGES = (
    StagePlan(
        blocks=32,
        example="model.layers.0",
        linears=(
            ("self_attn.q_proj", 4096, 4096),
            ("self_attn.k_proj", 4096, 1024),
            ("self_attn.v_proj", 4096, 1024),
        ),
    ),
    StagePlan(blocks=32, example="model.layers.0", linears=(("mlp.down_proj", 14336, 4096),)),
)
PLAN = QuantizePlan(
    bits=4,
    group_size=128,
    group_reason="",
    blocks=32,
    linears=224,
    stages=STAGES,
    quantized_share=0.869,
    bits_per_weight=4.156,
    bits_per_parameter=5.708,
    size_before_bytes=16_060_522_496,
    size_after_bytes=5_730_000_000,
    snapshot_bytes=2_684_354_560,
    gradient_bytes=8_589_934_592,
    samples=128,
    seq_len=2048,
    seconds=905.0,
)


def fits() -> MapReport:
    """Two cards, and a CPU for the output head."""
    return MapReport(
        model="meta-llama/Llama-3.1-8B",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        parameters=8_030_261_248,
        weights_bytes=16_060_522_496,
        blocks=32,
        spec="auto",
        max_memory="cuda:0=20GiB",
        inventory="given",
        budgets=(
            DeviceBudget(Device("cuda", 0), 24 * GIB, 23 * GIB),
            DeviceBudget(Device("cuda", 1), 24 * GIB, 23 * GIB),
            DeviceBudget(Device("cpu"), 64 * GIB, 60 * GIB),
        ),
        placement=None,
        reason="auto: all blocks on two cards, lm_head on cpu",
        tree=TREE,
        devices=(CARD, SECOND, HOST),
        offload=("lm_head",),
        offload_skipped=("model.rotary_emb",),
        findings=(OFFLOAD,),
        verdict="fits with warnings",
    )


def refused() -> MapReport:
    """The same model on a card that is too small."""
    small = replace(CARD, total_bytes=8 * GIB, free_bytes=8 * GIB, limit_bytes=8 * GIB)
    return replace(
        fits(),
        tree=(),
        devices=(small,),
        offload=(),
        offload_skipped=(),
        findings=(REFUSED,),
        verdict="refused",
        inventory="present",
        max_memory=None,
        reason="no placement",
    )


def planned() -> MapReport:
    """What a dry run answers."""
    return replace(
        fits(), plan=PLAN, time=TimeEstimate(seconds=905.0, source="an estimate from a short probe")
    )
