#!/usr/bin/env python3
"""Time the solver against the plain per-column loop, on the same matrices, in one run.

The plain loop is `tests.reference.gptq_original`: three factorisations, one outer product per column, every
later column rewritten after each block of 128 - the form of the original code, which most programs run. Both
get the same weights and the same Hessian. Ours runs with three settings: `plain` (those of the plain loop:
min/max scales, no order, no refinement), `fast` (static order, scale search) and `default` (with one sweep
and refit); ours also measures three losses, the plain loop none. Each time is the best of --repeat runs in
CPU seconds of this process; losses are relative output errors, so the lines can be compared.

    python scripts/bench_solver.py                       a sweep over N x K
    python scripts/bench_solver.py --shapes 4096x4096 --threads 2

The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.solver import quantize_linears
from tests import reference
from tests.gptq.cases import activations, weights

PLAIN: dict[str, Any] = {"act_order": "none", "scale_search": "minmax", "sweeps": 0, "refit": False}
OURS: dict[str, dict[str, Any]] = {"plain": PLAIN, "fast": {"sweeps": 0, "refit": False}, "default": {}}


def timed(work: Callable[[], Any], repeat: int) -> tuple[float, float, Any]:
    """CPU seconds and wall seconds of the best run, and the last result."""
    cpu = wall = float("inf")
    result = None
    for _ in range(repeat):
        started, started_cpu = time.perf_counter(), time.process_time()
        result = work()
        cpu, wall = min(cpu, time.process_time() - started_cpu), min(wall, time.perf_counter() - started)
    return cpu, wall, result


def gemm_peak(repeat: int) -> float:
    """GFLOP/s of a plain fp32 matmul in this process, to compare the times with."""
    A = torch.randn(2048, 2048)
    _, wall, _ = timed(lambda: A @ A, repeat + 2)
    return 2 * 2048**3 / wall / 1e9


def loss_of(W: Tensor, Q: Tensor, H: Tensor) -> float:
    E = W - Q
    return float(((E @ H) * E).sum() / ((W @ H) * W).sum())


def compare(N: int, K: int, options: argparse.Namespace) -> dict[str, Any]:
    """All candidates on one shape."""
    X = activations(2 * K, K, dtype=torch.float32)
    H, W = X.T @ X / X.shape[0], weights(N, K, dtype=torch.float32)
    del X
    cpu, wall, Q = timed(
        lambda: reference.gptq_original(W, H, options.bits, options.group_size, 0.05), options.repeat
    )
    row: dict[str, Any] = {
        "shape": f"{N}x{K}",
        "original": {"cpu_seconds": cpu, "wall_seconds": wall, "loss": loss_of(W, Q, H)},
    }
    for name, settings in OURS.items():
        config = QuantizeConfig(bits=options.bits, group_size=options.group_size, **settings)
        mine, wall, solved = timed(lambda c=config: quantize_linears([W], H, c), options.repeat)
        loss = loss_of(W, solved[0].dequantize(), H)
        row[name] = {"cpu_seconds": mine, "wall_seconds": wall, "loss": loss, "speedup": cpu / mine}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="576x576,1536x576,576x1536,3072x576,2048x2048,4096x4096")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="1 is robust on a busy machine")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    peak = gemm_peak(options.repeat)
    print(f"{'N x K':>12} {'':>9} {'CPU s':>8} {'wall s':>8} {'speedup':>8} {'loss':>10}")
    rows = []
    for shape in options.shapes.split(","):
        N, K = (int(part) for part in shape.split("x"))
        row = compare(N, K, options)
        rows.append(row)
        for name in ("original", *OURS):
            r = row[name]
            print(
                f"{shape:>12} {name:>9} {r['cpu_seconds']:8.3f} {r['wall_seconds']:8.3f} "
                f"{r.get('speedup', 1.0):7.1f}x {r['loss']:10.3e}",
                flush=True,
            )
    settings = {"bits": options.bits, "group_size": options.group_size, "threads": options.threads}
    print(json.dumps({"gemm_gflops": peak, "torch": torch.__version__, **settings, "rows": rows}))


if __name__ == "__main__":
    main()
