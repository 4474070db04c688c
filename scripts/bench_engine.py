#!/usr/bin/env python3
"""Where the time of a quantization goes, and how far each part is from what this machine can do.

Runs `gptq quantize` in this process with a clock around the engine's parts, measures the speed of large
matmuls in the same process just before and after, and compares the two:

    forward   the block's linears for every stream, counted by their shapes (attention and the elementwise
              rest are in the seconds and not in the count)
    moments   the lower block triangle of x xᵀ, and where the recipe wants it the cross moments of the streams
    goal      the step towards the dense model's output
    factor    Cholesky factors, K³/3 operations each, for the solve and for the step
    search, columns, refine, solve    the solver: scales, the loop over columns, sweeps, and the rest, which
              is losses and copies; thousands of small steps, not counted
    pack      codes to words;   write   words to the disk

"limit" is the counted arithmetic at the measured speed, of bf16 or of fp32 matmuls, whichever this machine
does faster; "distance" is the time from forward to pack over it.

    python scripts/bench_engine.py                              the demo model, fast, own outputs, 64 x 512
    python scripts/bench_engine.py -- --recipe best --samples 128
    OMP_NUM_THREADS=1 python scripts/bench_engine.py --cpu      one core, processor time: on a busy machine

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fetch_demo_model import NAME, ROOT, FetchError, fetch

DEFAULTS = ["--bits", "4", "--group-size", "64", "--samples", "64", "--seq-len", "512", "--recipe", "fast"]
OWN = ["--solve-for", "own"]
"""Unless the options name a recipe."""
SOLVER = ("goal", "factor", "search", "columns", "refine", "solve")
PARTS = ("load", "capture", "forward", "moments", *SOLVER, "pack", "write")


class Clock:
    """Seconds and counted operations by part. Parts nest: the inner one's time is not the outer one's."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, float] = defaultdict(float)
        self._open: list[list[float]] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted under `part`."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            self._open.append([0.0])
            try:
                return function(*args, **kwargs)
            finally:
                took = self.now() - started
                (inside,) = self._open.pop()
                self.seconds[part] += took - inside
                if self._open:
                    self._open[-1][0] += took

        return wrapper

    def timed_items(self, part: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """A generator function whose items take their time under `part`."""

        def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items = function(*args, **kwargs)
            step = self.timed(part, lambda: next(items, wrapper))
            while (item := step()) is not wrapper:
                yield item

        return wrapper


def gemm_rate(now: Callable[[], float], seconds: float = 1.0) -> float:
    """Multiply-adds x 2 per second of a large matmul, the best of several, in the faster of bf16 and fp32."""
    import torch

    best = float("inf")
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            started = now()
            torch.nn.functional.linear(a, b)
            best = min(best, now() - started)
    return 2 * 2048**3 / best


def instrument(clock: Clock) -> None:
    """Put the clock around the engine's parts, and count operations where their shapes are known."""
    from gptq_cli.checkpoint.writer import CheckpointWriter
    from gptq_cli.engine import block, experts, forwards, head, mixed
    from gptq_cli.engine import run as engine_run
    from gptq_cli.gptq import goal, losses, rounding, solver
    from gptq_cli.gptq.hessian import CrossMoment, Hessian
    from gptq_cli.gptq.moments import StageMoments
    from gptq_cli.model import block_stream

    def counted(part: str, function: Callable[..., Any], operations: Callable[..., float]) -> Any:
        timed = clock.timed(part, function)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            clock.operations[part] += operations(*args, **kwargs)
            return timed(*args, **kwargs)

        return wrapper

    def half(moment: Hessian, x: Any) -> float:
        return float(x.numel()) * moment.in_features

    def whole(moment: CrossMoment, error: Any, quant: Any) -> float:
        return 2.0 * error.numel() * moment.in_features

    def cubes(H: Any, *rest: Any) -> float:
        return float(H.shape[-1]) ** 3 / 3 * (H.shape[0] if H.ndim == 3 else 1)

    def put(place: Any, name: str, part: str, operations: Callable[..., float] | None = None) -> None:
        plain = getattr(place, name)
        timed = counted(part, plain, operations) if operations else clock.timed(part, plain)
        setattr(place, name, timed)

    put(Hessian, "add", "moments", half)
    put(CrossMoment, "add", "moments", whole)
    put(StageMoments, "add", "moments")
    put(StageMoments, "hessian", "moments")
    put(StageMoments, "goal", "goal")
    put(solver, "factorize_each", "factor", cubes)
    put(goal, "factorize", "factor", cubes)
    for kind in (forwards.ParkedForwards, forwards.ReplayedForwards):
        place: Any = kind
        place.inputs = clock.timed_items("forward", kind.inputs)
        put(kind, "finish", "forward")
    put(block, "find_stages", "forward")
    for module in (mixed, head):
        put(module, "quantize_linears", "solve")
    put(experts, "quantize_stages", "solve")
    for module in (rounding, solver, losses):
        put(module, "group_parameters", "search")
    put(rounding, "gptq", "columns")
    put(rounding, "refine_once", "refine")
    for module in (block, head):
        put(module, "pack", "pack")
    put(block, "unhooked_copy", "load")
    put(engine_run, "capture", "capture")
    put(block_stream.Filler, "fill", "load")
    for name in ("add_packed", "copy_dense", "finish"):
        put(CheckpointWriter, name, "write")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a dense model directory (default: SmolLM2, fetched)")
    parser.add_argument("--cpu", action="store_true", help="count processor seconds: for a busy machine")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="options of gptq quantize, after --")
    arguments = parser.parse_args(argv)
    try:
        model = arguments.model or fetch(ROOT / "demo" / NAME, ROOT / "demo" / "cache")
    except FetchError as error:
        print(f"bench_engine: {error}", file=sys.stderr)
        return 1
    import torch

    from gptq_cli.cli.app import main as gptq
    from gptq_cli.config import QuantizeConfig

    clock = Clock(time.process_time if arguments.cpu else time.perf_counter)
    rates = [gemm_rate(clock.now)]
    instrument(clock)
    with tempfile.TemporaryDirectory(prefix="gptq-bench-") as folder:
        own = [] if "--recipe" in arguments.options else OWN
        words = ["quantize", str(model), "--out", f"{folder}/out", *DEFAULTS, *own, *arguments.options]
        started, cpu = time.perf_counter(), time.process_time()
        code = clock.timed("rest", gptq)([*words, "--quiet"])
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        if code != 0:
            return int(code)
        report = json.loads((Path(folder) / "out" / "report.json").read_text())
    rates.append(gemm_rate(clock.now))
    rate = max(rates)
    settings = report["settings"]
    config = QuantizeConfig(solve_for=settings["solve_for"], dense_share=settings["dense_share"])
    streams = 1 + config.paired_samples(report["samples"], settings["seq_len"]) / report["samples"]
    weights = sum(
        linear["in_features"] * linear["out_features"]
        for block in report["blocks"]
        for linear in block["linears"]
    )
    clock.operations["forward"] = 2.0 * weights * report["tokens"] * streams
    limit = sum(clock.operations.values()) / rate
    engine = sum(clock.seconds[part] for part in ("forward", "moments", *SOLVER, "pack"))
    print(f"\n{model.name}, {' '.join(words[4:])}, {torch.get_num_threads()} threads")
    print(f"large matmul: {rate / 1e9:.0f} GFLOP/s\n")
    print(f"{'part':<10}{'seconds':>9}{'share':>7}{'GFLOP':>10}{'GFLOP/s':>9}{'of limit':>9}")
    parts = {}
    for part in (*PARTS, "rest"):
        seconds, operations = clock.seconds[part], clock.operations.get(part, 0.0)
        speed = operations / seconds if seconds else 0.0
        parts[part] = {"seconds": round(seconds, 2), "gflop": round(operations / 1e9, 1)}
        tail = f"{operations / 1e9:>10.0f}{speed / 1e9:>9.0f}{speed / rate:>9.0%}" if operations else ""
        print(f"{part:<10}{seconds:>9.2f}{seconds / wall:>7.0%}{tail}")
    print(f"{'all':<10}{wall:>9.2f}       user and system {cpu:.1f} s")
    print(f"forward to pack {engine:.1f} s, limit {limit:.1f} s, distance {engine / limit:.2f}\n")
    summary = {
        "model": model.name,
        "options": words[4:],
        "threads": torch.get_num_threads(),
        "gemm_gflops": round(rate / 1e9, 1),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "engine_seconds": round(engine, 1),
        "limit_seconds": round(limit, 1),
        "distance": round(engine / limit, 2),
        "parts": parts,
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
