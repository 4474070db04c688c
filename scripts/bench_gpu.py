#!/usr/bin/env python3
"""How fast a quantization is on an accelerator, phase by phase, beside what its arithmetic allows.

Random blocks in the shape of Llama-3-8B (4 of its 32, a vocabulary of 32,000), 128 x 2048 tokens of random
words, no model hub. Three runs in this process: the first one compiles and warms up, the second one is timed
as it is, the third one with a clock around the engine's parts, for which the host waits for the device at
each border. Then the same blocks through GPTQModel, in a process of its own, where that is installed.

    forward   2 · T · weights, and the causal half of the attention        at the speed of bf16 matmuls
    hessian   the lower block triangle: 9/16 · 2 · T · K²                  the same
    factor    K³ / 3                                                       a tenth of fp32's, as cuSOLVER does
    matmul    of the solver: 6 · R · K² (feedback, slopes, losses)         TF32
    columns   K steps to solve and K to sweep                              1.5 µs each, an estimate
    transfer  weights to the device, packed words back                     a pinned copy

The limit is their sum at the speeds that this process measures; `--limits` prints it for whole models at the
speeds that are named for an H100, without any device: the arithmetic behind the goals (8B in 30 s, 70B,
streamed, in 6 min). `--tiny` does everything in small, on whatever device there is: it shows that the script
works, and its figures mean nothing.

    python scripts/bench_gpu.py --out results         on a card: minutes
    python scripts/bench_gpu.py --limits              the table alone
    python scripts/bench_gpu.py --tiny

The last line is JSON; --out also gets it as bench_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_engine import Clock, instrument

ROOT = Path(__file__).resolve().parent.parent
TOKENS = (128, 2048)
HESSIAN_PART = 9 / 16
SOLVER_OPERATIONS = 6
PEER_SECONDS, ENDING_SECONDS = 240, 15
TEXT = "text.txt"


@dataclass(frozen=True)
class Shape:
    """A dense Llama."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    blocks: int
    goal_seconds: float
    """For the whole model on an H100."""

    def stages(self) -> tuple[tuple[int, int], ...]:
        """(K, rows) of each stage: q/k/v, o, gate/up, down."""
        kv = self.hidden * self.kv_heads // self.heads
        return (
            (self.hidden, self.hidden + 2 * kv),
            (self.hidden, self.hidden),
            (self.hidden, 2 * self.inner),
            (self.inner, self.hidden),
        )

    def fields(self, blocks: int, vocabulary: int) -> dict[str, int]:
        """Of a LlamaConfig."""
        return {
            "vocab_size": vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
        }


SHAPES = {
    "8b": Shape("Llama-3-8B", 4096, 14336, 32, 8, 32, 30.0),
    "70b": Shape("Llama-3-70B", 8192, 28672, 64, 8, 80, 360.0),
    "tiny": Shape("tiny", 128, 352, 4, 2, 4, 0.0),
}


@dataclass(frozen=True)
class Speeds:
    """Of a device: operations, steps and bytes per second."""

    name: str
    bf16: float
    tf32: float
    factor: float
    columns: float
    transfer: float


H100 = Speeds("H100, as named", 650e12, 350e12, 15e12, 1 / 1.5e-6, 25e9)


def limit_seconds(shape: Shape, tokens: int, seq_len: int, speeds: Speeds) -> dict[str, float]:
    """Seconds of one block, part by part."""
    stages = shape.stages()
    weights = sum(k * rows for k, rows in stages)
    attention = 2 * tokens * seq_len * shape.hidden
    return {
        "forward": (2 * tokens * weights + attention) / speeds.bf16,
        "hessian": HESSIAN_PART * 2 * tokens * sum(k * k for k, _ in stages) / speeds.bf16,
        "factor": sum(k**3 for k, _ in stages) / 3 / speeds.factor,
        "matmul": SOLVER_OPERATIONS * sum(rows * k * k for k, rows in stages) / speeds.tf32,
        "columns": 2 * sum(k for k, _ in stages) / speeds.columns,
        "transfer": 2.5 * weights / speeds.transfer,
    }


def print_limits(speeds: Speeds, samples: int, seq_len: int) -> dict[str, Any]:
    """The arithmetic behind the goals."""
    shapes = [shape for shape in SHAPES.values() if shape.goal_seconds]
    print(
        f"{samples} x {seq_len} tokens, {speeds.name}: bf16 {speeds.bf16 / 1e12:.0f} TFLOP/s, "
        f"TF32 {speeds.tf32 / 1e12:.0f}, factor {speeds.factor / 1e12:.0f}, "
        f"{1e6 / speeds.columns:.1f} µs a column, {speeds.transfer / 1e9:.0f} GB/s\n"
    )
    parts = {shape.name: limit_seconds(shape, samples * seq_len, seq_len, speeds) for shape in shapes}
    whole = {
        shape.name: {part: seconds * shape.blocks for part, seconds in parts[shape.name].items()}
        for shape in shapes
    }
    print(f"{'seconds':<10}" + "".join(f"{name:>14}" for name in whole))
    for part in next(iter(whole.values())):
        print(f"{part:<10}" + "".join(f"{found[part]:>14.1f}" for found in whole.values()))
    print(f"{'limit':<10}" + "".join(f"{sum(found.values()):>14.1f}" for found in whole.values()))
    print(f"{'goal':<10}" + "".join(f"{shape.goal_seconds:>14.0f}" for shape in shapes))
    return {"speeds": asdict(speeds), "limits": whole, "goals": {s.name: s.goal_seconds for s in shapes}}


def measured_speeds(device: Any, size: int) -> Speeds:
    """What this device does with large matrices, the best of several tries."""
    import torch

    from gptq_cli.devices.accelerators import synchronize
    from gptq_cli.gptq.matmul import fast_matmul
    from gptq_cli.timing import fastest

    def seconds_of(work: Callable[[], object]) -> float:
        work()
        return fastest(work, attempts=5, min_seconds=0.02, settle=lambda: synchronize(device))

    x = torch.randn(size, size, device=device)
    with fast_matmul():
        tf32 = seconds_of(lambda: x @ x)
    half = x.bfloat16()
    bf16 = seconds_of(lambda: half @ half)
    square = x @ x.T / size + torch.eye(size, device=device)
    factor = seconds_of(lambda: torch.linalg.cholesky_ex(square))
    host = torch.empty(size * size, dtype=torch.float32, pin_memory=device.type == "cuda" and _is_card())
    transfer = seconds_of(lambda: x.view(-1).copy_(host, non_blocking=True))
    return Speeds(
        name="measured here",
        bf16=2 * size**3 / bf16,
        tf32=2 * size**3 / tf32,
        factor=size**3 / 3 / factor,
        columns=H100.columns,
        transfer=4 * size * size / transfer,
    )


def _is_card() -> bool:
    import torch

    built: bool = torch.backends.cuda.is_built()
    return built and torch.cuda.is_available()


def quantized(model: Path, text: Path, out: Path, options: argparse.Namespace) -> Any:
    """One run through the job that the command runs; its report."""
    from gptq_cli import jobs
    from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
    from gptq_cli.events import Event, Warned

    def observe(event: Event) -> None:
        if isinstance(event, Warned):
            print(f"warning: {event.message}", file=sys.stderr)

    recipe, solve_for = ("fast", "own") if options.recipe == "own" else (options.recipe, None)
    job = QuantizeJob(
        model=ModelRef(model=str(model)),
        out=str(out),
        quantize=QuantizeConfig.of(recipe, bits=4, group_size=options.group_size, solve_for=solve_for),
        calibration=CalibrationConfig.of(str(text), samples=options.samples, seq_len=options.seq_len),
    )
    started = time.perf_counter()
    report = jobs.quantize(job, observe)
    wall = time.perf_counter() - started
    shutil.rmtree(out)
    return report, wall


def peaks(report: Any) -> list[dict[str, Any]]:
    """Predicted and measured, of every device."""
    measured = dict(report.measured_peak_bytes)
    return [
        {"device": device, "predicted_bytes": predicted, "measured_bytes": measured[device],
         "ratio": round(measured[device] / predicted, 3) if predicted else None}
        for device, predicted in report.predicted_peak_bytes if device in measured
    ]  # fmt: skip


def peer_seconds(folder: Path, options: argparse.Namespace, left_seconds: float) -> dict[str, Any]:
    """GPTQModel with its defaults on the same token ids, where it is installed and there is time for it."""
    if options.no_peer:
        return {"skipped": "--no-peer"}
    if find_spec("gptqmodel") is None:
        return {"skipped": "gptqmodel is not installed"}
    seconds = min(PEER_SECONDS, left_seconds - ENDING_SECONDS)
    if seconds <= 0:
        return {"skipped": "there was no time for it"}
    model, text = folder / "model", folder / TEXT
    from bench_peers import token_ids

    ids = token_ids(argparse.Namespace(**vars(options), eval_seq_len=options.seq_len, windows=1), model,
                    str(text), str(text))["ids"]  # fmt: skip
    request = folder / "peer.json"
    request.write_text(json.dumps({"model": str(model), "bits": 4, "group_size": options.group_size,
                                   "desc_act": False, "dtype": "bfloat16", "ids": ids}))  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts" / "bench_peers.py"), "--client", "gptqmodel"]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, str(request), str(folder / "peer")],
            capture_output=True, text=True, check=False, timeout=seconds, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {seconds:.0f} s"}
    wall = time.perf_counter() - started
    if done.returncode != 0:
        return {"failed": " | ".join((done.stderr or done.stdout).splitlines()[-3:])}
    return {"process_seconds": round(wall, 1)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="everything in small, on any device")
    parser.add_argument("--limits", action="store_true", help="only the arithmetic behind the goals")
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"], default="8b")
    parser.add_argument("--blocks", type=int, default=4, help="how many of the model's blocks (default: 4)")
    parser.add_argument("--samples", type=int, default=TOKENS[0])
    parser.add_argument("--seq-len", type=int, default=TOKENS[1])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument(
        "--recipe",
        choices=["own", "fast", "balanced"],
        default="own",
        help="own: fast with --solve-for own, which is what the limits are of",
    )
    parser.add_argument("--no-peer", action="store_true", help="without GPTQModel")
    parser.add_argument("--seconds", type=float, default=3600, help="GPTQModel gets what is left of them")
    parser.add_argument("--out", type=Path, help="a folder for bench_gpu.json")
    options = parser.parse_args(argv)
    if options.tiny:
        options.shape, options.blocks, options.group_size = "tiny", 2, 32
        options.samples, options.seq_len = 8, 64
    return options


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that needs a device but the peer; the tables go to stdout."""
    sys.path.insert(0, str(ROOT))
    import torch

    from gptq_cli.devices.accelerators import current_accelerator, synchronize, torch_device
    from gptq_cli.gptq.walk_choice import walk_on
    from tests.e2e.commands import write_text
    from tests.gpu.models import save_random

    device, shape = torch_device(current_accelerator()), SHAPES[options.shape]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    started = time.perf_counter()
    vocabulary = 2048 if options.tiny else 32_000
    model = save_random(folder / "model", **shape.fields(options.blocks, vocabulary))
    words = 3 * options.samples * options.seq_len
    text = write_text(folder / TEXT, words=words)
    print(
        f"{name}, torch {torch.__version__}: {options.blocks} random blocks of {shape.name}, "
        f"{options.samples} x {options.seq_len} tokens; made in {time.perf_counter() - started:.0f} s\n"
    )
    speeds = measured_speeds(device, 512 if options.tiny else 8192)
    walk = walk_on(device, torch.float32).name
    _, first = quantized(model, text, folder / "out", options)
    report, wall = quantized(model, text, folder / "out", options)

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    clock = Clock(now)
    instrument(clock)
    clocked = clock.timed("rest", quantized)
    clocked(model, text, folder / "out", options)
    blocks = options.blocks
    per_block = {part: seconds / blocks for part, seconds in clock.seconds.items()}
    limits = limit_seconds(shape, options.samples * options.seq_len, options.seq_len, speeds)
    print_phases(per_block, limits)
    found = peaks(report)
    for peak in found:
        print(f"peak on {peak['device']}: predicted {peak['predicted_bytes'] / 2**30:.2f} GiB, "
              f"measured {peak['measured_bytes'] / 2**30:.2f}")  # fmt: skip
    block = statistics.median(entry.seconds for entry in report.blocks)
    outside = wall - sum(entry.seconds for entry in report.blocks)
    whole = shape.blocks * block + outside
    print(f"\nfirst run {first:.1f} s, second {wall:.1f} s, of which {outside:.1f} s outside the blocks; "
          f"a block {block:.2f} s (limit {sum(limits.values()):.2f})")  # fmt: skip
    print(f"{shape.blocks} blocks: {whole:.1f} s (goal {shape.goal_seconds:.0f}, limit "
          f"{shape.blocks * sum(limits.values()):.1f}); walk: {walk}")  # fmt: skip
    return {
        "device": name, "torch": torch.__version__, "shape": shape.name, "blocks": blocks,
        "samples": options.samples, "seq_len": options.seq_len, "recipe": options.recipe, "walk": walk,
        "speeds": asdict(speeds), "first_seconds": round(first, 2), "seconds": round(wall, 2),
        "block_seconds": [round(entry.seconds, 3) for entry in report.blocks],
        "phases_per_block": {part: round(seconds, 4) for part, seconds in per_block.items()},
        "limits_per_block": {part: round(seconds, 5) for part, seconds in limits.items()},
        "model_seconds": round(whole, 1), "goal_seconds": shape.goal_seconds,
        "peaks": found,
    }  # fmt: skip


LIMIT_OF = {
    "forward": ("forward",),
    "moments": ("hessian",),
    "factor": ("factor",),
    "columns": ("columns", "matmul"),
    "load": ("transfer",),
}
"""Phase -> the parts of the limit beside it; the matmuls of refine and solve are counted with the columns."""


def print_phases(per_block: dict[str, float], limits: dict[str, float]) -> None:
    """Seconds of a block, part by part, beside the limit."""
    print(f"{'phase':<10}{'s a block':>12}{'limit':>10}")
    for part, seconds in sorted(per_block.items(), key=lambda item: -item[1]):
        if part == "rest":
            continue  # imports, checks, text: not of a block
        limit = sum(limits[name] for name in LIMIT_OF.get(part, ()))
        print(f"{part:<10}{seconds:>12.3f}" + (f"{limit:>10.3f}" if limit else ""))
    print()


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.limits:
        print(json.dumps(print_limits(H100, options.samples, options.seq_len)))
        return 0
    started = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="gptq-bench-gpu-"))
    try:
        summary = bench(options, folder)
        keep(summary, options.out)  # whatever becomes of the peer
        summary["gptqmodel"] = peer_seconds(
            folder, options, options.seconds - (time.perf_counter() - started)
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    keep(summary, options.out)
    print(f"GPTQModel: {summary['gptqmodel']}\n")
    print(json.dumps(summary))
    return 0


def keep(summary: dict[str, Any], out: Path | None) -> None:
    """Write what there is so far."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench_gpu.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
