"""A synthetic run, shared by the tests of every display: two devices, blocks, a fallback, flushes, warnings.

`sample_run()` is the whole run as (seconds, event) pairs; `report()` is its result.
"""

from collections.abc import Iterator
from dataclasses import replace

from gptq_cli import events as e
from gptq_cli.findings import Finding
from gptq_cli.placement.device import Device
from gptq_cli.placement.schedule import BlockSchedule, Schedule
from gptq_cli.results.load import (
    Agreement,
    Bench,
    Gate,
    KernelCount,
    LoadReport,
    Rate,
    RuleResult,
    Speed,
    TargetReport,
    VerifyReport,
)
from gptq_cli.results.run import BlockReport, LinearReport, RunReport, TextShare

GIB = 2**30
MIB = 2**20
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}
OFFLOAD = Finding(
    rule="cpu-offload",
    level="warning",
    subject="model.layers.28-29",
    message="CPU offload is not recommended with GPTQ quantization: 2 modules, 13.5 MiB, run through hooks",
    hint="gptq quantize HuggingFaceTB/SmolLM2-135M --device-map cuda:0 --out smol-w4g64",
    modules=("model.layers.28", "model.layers.29"),
    size_bytes=14_155_776,
)
DENSE = Finding(
    rule="left-dense",
    level="note",
    subject="lm_head",
    message="stays dense: 28,311,552 of 134,515,008 parameters (21.0 %)",
    modules=("lm_head", "model.embed_tokens"),
    size_bytes=56_623_104,
)
REFUSED = Finding(
    rule="disk-offload",
    level="error",
    subject="model.layers.30-31",
    message="disk offload is not supported with GPTQ quantization: 2 modules are mapped to disk",
    hint="gptq quantize meta-llama/Llama-3.1-8B --device-map model.layers.0-29=0,rest=cpu --out llama-w4g128",
    modules=("model.layers.30", "model.layers.31"),
    size_bytes=872_448_000,
)


def memory(step: int, reserved: float = 1.9) -> tuple[e.DeviceMemory, ...]:
    """Memory of both devices after `step` blocks."""
    return (
        e.DeviceMemory(
            device="cuda:0",
            allocated_bytes=int(1.25 * GIB) + step * MIB,
            reserved_bytes=int(reserved * GIB),
            peak_bytes=int(1.75 * GIB),
            total_bytes=24 * GIB,
        ),
        e.DeviceMemory(
            device="cpu",
            allocated_bytes=int(3.5 * GIB),
            reserved_bytes=int(3.5 * GIB),
            peak_bytes=4 * GIB,
            total_bytes=64 * GIB,
        ),
    )


def linear(block: str, name: str, index: int) -> LinearReport:
    """Linear `name` of block number `index`; the `down_proj` of block 1 fell back to round-to-nearest."""
    k, n = SHAPES[name]
    fallback = index == 1 and name == "mlp.down_proj"
    rtn = 0.0312 + 0.004 * index + k / 1e5
    return LinearReport(
        name=f"{block}.{name}",
        in_features=k,
        out_features=n,
        bits=4,
        group_size=64,
        loss=rtn if fallback else rtn * 0.41,
        rtn_loss=rtn,
        damp_percent=0.5 if fallback else 0.05,
        attempts=4 if fallback else 1,
        method="rtn" if fallback else "gptq",
        tokens=65536,
        seconds=0.2 + k / 4000,
    )


def block_report(index: int) -> BlockReport:
    """Block number `index` with its seven linears."""
    name = f"model.layers.{index}"
    linears = tuple(linear(name, relative, index) for stage in STAGES for relative in stage)
    return BlockReport(
        name=name,
        seconds=6.5 + index / 10,
        peak_bytes=(("cuda:0", int(1.75 * GIB) + index * MIB), ("cpu", 4 * GIB)),
        linears=linears,
    )


def report(blocks: int = 3) -> RunReport:
    """The result of the sample_run."""
    return RunReport(
        model="HuggingFaceTB/SmolLM2-135M",
        revision="93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        out="smol-w4g64",
        bits=4,
        group_size=64,
        sym=True,
        desc_act=False,
        checkpoint_format="gptq",
        bits_per_weight=4.281,
        bits_per_parameter=6.792,
        quantized_share=0.7895,
        dense_modules=("lm_head", "model.embed_tokens"),
        size_before_bytes=269_060_552,
        size_after_bytes=114_200_000,
        dtype="bfloat16",
        use_cuda_fp16=False,
        devices=("cuda:0", "cpu"),
        predicted_peak_bytes=(("cuda:0", int(1.8 * GIB)), ("cpu", int(4.2 * GIB))),
        measured_peak_bytes=(("cuda:0", int(1.75 * GIB)), ("cpu", 4 * GIB)),
        samples=128,
        seq_len=512,
        tokens=65536,
        dataset_sha256="5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
        calibration_source="pydoc",
        calibration_texts=(TextShare(source="pydoc", weight=1.0, samples=128, tokens=65536),),
        seed=0,
        fallbacks=1,
        warnings=("cuda:0 holds 1 MiB more after each flush",),
        seconds=31.4,
        phase_seconds=(("open", 0.4), ("calibration", 1.2), ("load", 2.1), ("capture", 3.0), ("save", 1.1)),
        versions=(("gptq-cli", "0.1.0"), ("torch", "2.13.0")),
        command_line=("gptq", "quantize", "HuggingFaceTB/SmolLM2-135M", "--out", "smol-w4g64"),
        settings=(("bits", 4), ("group_size", 64), ("sym", True), ("damp_percent", 0.05)),
        blocks=tuple(block_report(index) for index in range(blocks)),
        schedule=Schedule(
            micro_batch_samples=32,
            seq_len=512,
            blocks=tuple(
                BlockSchedule(
                    name=f"model.layers.{index}",
                    storage_device=Device("cuda", 0),
                    execution_device=Device("cuda", 0),
                    replayed=None,
                    expert_batch_bytes=512 * MIB,
                    solve_batch_rows=65536,
                )
                for index in range(blocks)
            ),
        ),
    )


def load_report() -> LoadReport:
    """A load that generated and measured."""
    return LoadReport(
        path="smol-w4g64",
        quantizer="gptq-cli 0.1.0",
        bits=4,
        group_size=64,
        sym=True,
        desc_act=False,
        checkpoint_format="gptq",
        linears=210,
        device_map="cpu",
        device_reason="no accelerator is present",
        dtype="bfloat16",
        use_cuda_fp16=False,
        kernels=(
            KernelCount(kernel="int4pack", linears=180, reason="4 bits, group 64, cpu, bfloat16"),
            KernelCount(kernel="dequantize", linears=30, reason="group size 48 is not a multiple of 32"),
        ),
        load_seconds=0.84,
        weight_bytes=114_200_000,
        memory=(("cpu", 512 * MIB),),
        prompt="The capital of France is",
        text="Paris, a city of [bold]two[/bold] million people.",
        new_tokens=9,
        tokens_per_second=21.5,
        perplexity=23.456,
        windows=64,
        seq_len=512,
    )


def full_load_report() -> LoadReport:
    """A load that proved everything there is to prove."""
    return replace(
        load_report(),
        text_source="pydoc-heldout",
        against="HuggingFaceTB/SmolLM2-135M",
        agreement=Agreement(
            kl=0.0213,
            top1=0.9342,
            perplexity=23.456,
            dense_perplexity=22.9,
            tokens=32768,
            windows=64,
        ),
        bench=Bench(
            speed=speed(812.3, 41.2),
            weight_bytes=114_200_000,
            memory=(("cpu", 512 * MIB),),
            dense_speed=speed(1020.1, 22.1),
            dense_weight_bytes=269_000_000,
        ),
        gates=(Gate("max_kl", 0.02, 0.0213), Gate("max_perplexity", 30.0, 23.456)),
        verification=verify_report(sound=False),
    )


def speed(prompt: float, decode: float) -> Speed:
    """Of 5 rounds."""
    return Speed(
        prompt=Rate(prompt, prompt / 50),
        decode=Rate(decode, decode / 40),
        prompt_tokens=512,
        new_tokens=32,
        rounds=5,
    )


def verify_report(*, sound: bool) -> VerifyReport:
    """Two parts and two readers; unsound: the scales are bad, and the second reader refuses."""
    names = tuple(f"model.layers.{index}.mlp.down_proj" for index in range(6))
    scales = Finding(
        rule="scales-finite",
        level="error",
        subject=f"{names[0]} and 5 more",
        message="scales hold values that are not finite",
        modules=names,
    )
    dtype = Finding(
        rule="half-precision",
        level="warning",
        subject="vllm",
        message="the model's dtype is float32; its kernels run in float16 or bfloat16",
        hint="start the server with --dtype float16",
    )
    bits = Finding(
        rule="four-bits-only",
        level="error",
        subject="exllamav2",
        message="3-bit codes; allowed: 4",
        hint="quantize with --bits 4",
    )
    return VerifyReport(
        path="smol-w4g64",
        checks=(
            RuleResult("files", "headers, sizes and config agree", ()),
            RuleResult("scales", "scales are finite", () if sound else (scales,)),
        ),
        targets=(
            TargetReport(
                target="vllm",
                rules=(
                    RuleResult(
                        "config-json",
                        "All readers but GPTQModel read config.json alone.",
                        (),
                    ),
                    RuleResult("half-precision", "The kernels run in half precision.", (dtype,)),
                ),
            ),
            TargetReport(
                target="exllamav2",
                rules=(
                    RuleResult(
                        "four-bits-only",
                        "ExLlamaV2's GPTQ kernel reads 4-bit codes only.",
                        () if sound else (bits,),
                    ),
                ),
            ),
        ),
        tensors=903,
        linears=210,
        size_bytes=114_200_000,
        coverage=1.0,
    )


def sample_run(blocks: int = 3) -> Iterator[tuple[float, e.Event]]:
    """The complete run: (seconds since its start, event)."""
    now = 0.0
    yield (
        now,
        e.RunStarted(
            command="quantize",
            model="HuggingFaceTB/SmolLM2-135M",
            out="smol-w4g64",
            settings=(
                ("bits", "4"),
                ("group size", "64"),
                ("symmetric", "yes"),
                ("desc_act", "no"),
                ("dtype", "bfloat16"),
                ("calibration", "pydoc, 128 x 512 tokens"),
            ),
            devices=("cuda:0", "cpu"),
            blocks=blocks,
            linears=7 * blocks,
        ),
    )
    yield now, e.FindingRaised(OFFLOAD)
    yield now, e.FindingRaised(DENSE)
    yield now, e.PhaseStarted("load")
    yield now + 2.1, e.PhaseFinished("load", 2.1, "272 tensors, 257 MiB")
    now += 2.1
    yield now, e.PhaseStarted("capture", 128)
    for done in (32, 64, 96, 128):
        now += 0.75
        yield now, e.PhaseAdvanced("capture", done, 128)
    yield now, e.PhaseFinished("capture", 3.0, "128 samples")
    yield (
        now,
        e.CacheFlushed(
            where="capture", subject="", before=memory(0, reserved=2.4), after=memory(0, reserved=1.9)
        ),
    )
    for index in range(blocks):
        name = f"model.layers.{index}"
        yield now, e.BlockStarted(name=name, index=index, total=blocks, device="cuda:0", stages=STAGES)
        for number, stage in enumerate(STAGES):
            for done in (64, 128):
                now += 0.5
                yield (
                    now,
                    e.SamplesAdvanced(block=name, stage=number, stages=len(STAGES), done=done, total=128),
                )
            for relative in stage:
                now += 0.3
                yield now, e.LinearQuantized(name, linear(name, relative, index))
        yield (
            now,
            e.BlockFinished(index=index, total=blocks, report=block_report(index), memory=memory(index)),
        )
        yield (
            now,
            e.CacheFlushed(
                where="block",
                subject=name,
                before=memory(index, reserved=2.2),
                after=memory(index, reserved=1.9),
            ),
        )
    yield now, e.Warned("cuda:0 holds 1 MiB more after each flush", hint="report it with report.json")
    yield now, e.PhaseStarted("save", 1)
    now += 1.1
    yield now, e.ShardWritten("model.safetensors", 114_000_000, 903)
    yield now, e.PhaseFinished("save", 1.1)
    yield now, e.CacheFlushed(where="end", subject="", before=memory(3), after=memory(3, reserved=0.5))
    yield now, e.RunFinished(replace(report(blocks), seconds=round(now, 1)))
