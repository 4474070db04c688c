#!/usr/bin/env python3
"""Time the solver on experts of one shape: side by side in batches, against one after the other, in one run.

Each stage has gate and up (N rows each) over K columns, a Hessian of its own, and the default settings. The
batched run solves as many stages side by side as `--batch` says, or as the schedule of a plan says (default).
Each time is the best of --repeat runs in CPU seconds of this process; codes and losses are compared.

    python scripts/bench_experts.py                       three shapes
    python scripts/bench_experts.py --shapes 2x768x2048 --experts 32 --batch 1,2,4,8,16

The last line of standard output is JSON; its last entry is the ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptq_cli.config import QuantizeConfig
from gptq_cli.gptq.quantized import QuantizedLinear
from gptq_cli.gptq.solver import quantize_linears, quantize_stages
from scripts.bench_solver import timed
from tests.gptq.cases import activations, weights


def one_by_one(W: list[list[Tensor]], H: Tensor, config: QuantizeConfig) -> list[list[QuantizedLinear]]:
    return [quantize_linears(weights, h, config) for weights, h in zip(W, H, strict=True)]


def batched(
    W: list[list[Tensor]], H: Tensor, config: QuantizeConfig, size: int
) -> list[list[QuantizedLinear]]:
    return [
        linears
        for start in range(0, len(W), size)
        for linears in quantize_stages(W[start : start + size], H[start : start + size], config)
    ]


def compare(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    linears, N, K = (int(part) for part in shape.split("x"))
    W = [
        [weights(N, K, seed=100 * e + i, dtype=torch.float32) for i in range(linears)]
        for e in range(options.experts)
    ]
    X = [activations(K, K, seed=e, dtype=torch.float32) for e in range(min(4, options.experts))]
    H = torch.stack([X[e % len(X)].T @ X[e % len(X)] / K * (1 + e) for e in range(options.experts)])
    config = QuantizeConfig(group_size=options.group_size)
    alone, _, theirs = timed(lambda: one_by_one(W, H, config), options.repeat)
    print(f"{shape:>14} {'one by one':>12} {alone:8.2f} s", flush=True)
    row: dict[str, Any] = {"shape": shape, "experts": options.experts, "one_by_one_seconds": alone}
    for size in options.batch:
        together, _, ours = timed(lambda size=size: batched(W, H, config, size), options.repeat)
        pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
        same = sum(torch.equal(a.codes, b.codes) for a, b in pairs)
        apart = max(abs(a.loss - b.loss) for a, b in pairs)
        assert apart < 1e-5, f"losses are {apart} apart"
        ratio = alone / together
        print(
            f"{'':>14} {f'batch of {size}':>12} {together:8.2f} s {ratio:6.2f}x,"
            f" codes equal in {same} of {len(pairs)}",
            flush=True,
        )
        row |= {f"batch_{size}_seconds": together, f"batch_{size}_ratio": ratio}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="2x256x512,2x768x2048,1x2048x768", help="linears x N x K")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument(
        "--batch", type=lambda text: [int(x) for x in text.split(",")], default=[1, 2, 4, 8, 16, 32]
    )
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="1 is robust on a busy machine")
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    rows = [compare(shape, options) for shape in options.shapes.split(",")]
    print(json.dumps({"torch": torch.__version__, "threads": options.threads, "rows": rows}))


if __name__ == "__main__":
    main()
