#!/usr/bin/env python3
"""Time the solver on experts of one shape: side by side in batches, against one after the other, in one run.

Each expert has linears of N rows over K columns that read the same input, a Hessian of its own, and the
default settings. Batches have the sizes of `--batch`, or that of a plan for a CPU. `one large` is a single
linear with the rows of all experts: what their weights cost without anything that is done once per expert.
Each time is the best of --repeat runs in CPU seconds of this process; codes are compared, and losses must
agree to 1e-5.

Expected: the loop over columns is 15 to 20 calls of torch per column, whatever N is, so small experts gain
most, about twice, and experts of more than some 1,500 rows nothing. On an accelerator every call is a kernel
of some microseconds, and the gain should come close to the size of the batch: not measured. The figures are
in docs/speed.md.

    python scripts/bench_experts.py                       three shapes
    python scripts/bench_experts.py --shapes 2x768x2048 --experts 32 --batch 1,2,4,8,16

The last line of standard output is JSON.
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
from gptq_cli.planning.schedule import SOLVE_BATCH_ROWS
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
    whole = [torch.cat([one for expert in W for one in expert])]
    large, _, _ = timed(lambda: quantize_linears(whole, H[0], config), options.repeat)
    print(f"{'':>14} {'one large':>12} {large:8.2f} s {alone / large:6.2f}x", flush=True)
    row |= {"one_large_seconds": large, "one_large_ratio": alone / large}
    planned = max(1, SOLVE_BATCH_ROWS // (linears * N))
    for size in options.batch or [min(planned, options.experts)]:
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
    parser.add_argument("--shapes", default="2x256x512,1x512x256,2x768x2048", help="linears x N x K")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--batch", type=lambda text: [int(x) for x in text.split(",")], default=[])
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
