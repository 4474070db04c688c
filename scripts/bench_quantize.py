#!/usr/bin/env python3
"""How long `gptq quantize` takes on this machine, phase by phase, and how much memory it needs.

Runs the command in a process of its own, on the demo model or on --model, and reads its `--json` result and
the process's own accounts. The last line is JSON. Wall times of a busy machine are upper bounds.

    python scripts/bench_quantize.py                  the demo model, 4 bits, group 64, 128 x 512 tokens
    python scripts/bench_quantize.py -- --bits 8      any options of gptq quantize after --
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fetch_demo_model import NAME, ROOT, FetchError, fetch

DEFAULTS = ["--bits", "4", "--group-size", "64", "--samples", "128", "--seq-len", "512"]
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a dense model directory (default: SmolLM2, fetched)")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="options of gptq quantize, after --")
    arguments = parser.parse_args(argv)
    try:
        model = arguments.model or fetch(ROOT / "demo" / NAME, ROOT / "demo" / "cache")
    except FetchError as error:
        print(f"bench_quantize: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="gptq-bench-") as folder:
        command = [sys.executable, "-m", "gptq_cli", "quantize", str(model), "--out", f"{folder}/out"]
        command += [*DEFAULTS, *arguments.options, "--json", "--progress", "none"]
        started = time.perf_counter()
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False
        )
        wall = time.perf_counter() - started
    if done.returncode != 0:
        return done.returncode
    run = json.loads(done.stdout)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = usage.ru_maxrss * MAXRSS_UNIT
    tokens = run["tokens"]
    print(
        f"{model.name}: {run['bits']} bits, group {run['group_size']}, "
        f"{run['samples']} x {run['seq_len']} tokens\n"
    )
    for name, seconds in run["phase_seconds"].items():
        print(f"  {name:<14}{seconds:>9.1f} s")
    blocks = [block["seconds"] for block in run["blocks"]]
    print(f"  {'blocks':<14}{sum(blocks):>9.1f} s   {len(blocks)} of {sum(blocks) / len(blocks):.2f} s")
    print(f"  {'process':<14}{wall:>9.1f} s   user {usage.ru_utime:.0f} s, peak {peak / 2**30:.2f} GiB")
    summary = {
        "model": model.name,
        "wall_seconds": round(wall, 1),
        "user_seconds": round(usage.ru_utime, 1),
        "block_seconds": round(sum(blocks), 1),
        "peak_rss_bytes": peak,
        "calibration_tokens": tokens,
        "phases": {name: round(seconds, 2) for name, seconds in run["phase_seconds"].items()},
        "torch": run["versions"].get("torch"),
    }
    print(f"\n{json.dumps(summary)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
