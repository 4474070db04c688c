#!/usr/bin/env python3
"""Time linears and attention of 16-bit models on this CPU: as torch does them, and as `gptq` has them done.

On a processor without 16-bit matmul instructions `devices/fp32_matmul.py` widens their operands to fp32. Each
case runs in bfloat16 and float16 as they are, in both inside `Fp32Matmul`, and in fp32 from end to end,
forward and with the way back to its inputs; times are the best of --repeat, in milliseconds of wall time.

    python scripts/bench_matmul.py
    python scripts/bench_matmul.py --linears 2048x576x1536 --attention 4x9x512x64 --threads 2

The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gptq_cli.devices.fp32_matmul import Fp32Matmul
from gptq_cli.gptq.matmul import fast_matmul_supported

WAYS = {
    "bfloat16": (torch.bfloat16, nullcontext),
    "float16": (torch.float16, nullcontext),
    "bfloat16, widened": (torch.bfloat16, Fp32Matmul),
    "float16, widened": (torch.float16, Fp32Matmul),
    "fp32": (torch.float32, nullcontext),
}


def linear(shape: list[int], dtype: torch.dtype) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """tokens x K x N: its input, and the linear."""
    tokens, columns, rows = shape
    weight = torch.randn(rows, columns, dtype=dtype)
    return [torch.randn(tokens, columns, dtype=dtype)], lambda x: functional.linear(x, weight)


def attention(shape: list[int], dtype: torch.dtype) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """samples x heads x tokens x width: queries, keys and values, and causal attention."""
    inputs = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    return inputs, lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def milliseconds(work: Callable[[], object], repeat: int) -> float:
    """Of the best run, after one that does not count."""
    best = float("inf")
    for turn in range(repeat + 1):
        started = time.perf_counter()
        work()
        if turn:
            best = min(best, time.perf_counter() - started)
    return 1e3 * best


def measured(kind: Callable[..., tuple[list[Tensor], Callable[..., Tensor]]], name: str, repeat: int) -> dict:
    """Way -> milliseconds forward, and forward and back."""
    found = {}
    for way, (dtype, scope) in WAYS.items():
        inputs, work = kind([int(size) for size in name.split("x")], dtype)
        towards = torch.randn_like(work(*inputs))

        def forward(inputs: list[Tensor] = inputs, work: Callable[..., Tensor] = work) -> Tensor:
            return work(*inputs)

        def both(inputs: list[Tensor] = inputs, towards: Tensor = towards, work: Callable = work) -> None:
            work(*(x.detach().requires_grad_() for x in inputs)).backward(towards)

        with scope():
            found[way] = (milliseconds(forward, repeat), milliseconds(both, repeat))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--linears", default="2048x576x1536,64x640x65536", help="tokens x K x N")
    parser.add_argument(
        "--attention",
        default="4x9x512x64,1x9x2048x64,4x4x512x256,1x32x1024x128",
        help="samples x heads x tokens x width",
    )
    parser.add_argument("--threads", type=int, default=1, help="1 is robust on a busy machine")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fast = {str(dtype): fast_matmul_supported(dtype, "cpu") for dtype in (torch.bfloat16, torch.float16)}
    print(f"16 bits multiplied as fast by this CPU: {fast}")
    print(f"{'':>30}" + "".join(f"{way:>20}" for way in WAYS))
    rows = []
    for title, kind, names in (
        ("linear", linear, options.linears),
        ("attention", attention, options.attention),
    ):
        for name in filter(None, names.split(",")):
            found = measured(kind, name, options.repeat)
            for place, turn in enumerate(("forward", "and back")):
                values = "".join(f"{pair[place]:20.1f}" for pair in found.values())
                print(f"{title + ' ' + name if not place else turn:>30}{values}", flush=True)
            rows.append({"kind": title, "shape": name, "milliseconds": found})
    print(json.dumps({"torch": torch.__version__, "threads": options.threads, "fast": fast, "rows": rows}))


if __name__ == "__main__":
    main()
