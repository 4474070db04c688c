#!/usr/bin/env python3
"""Does an independent client load our checkpoint and compute the same?

The client is Transformers with optimum and GPTQModel on the CPU, in a virtual environment of its own
(`.venv-interop`, made on the first run; minutes and 2 GB). It gets nothing from us but the checkpoint
directory and token ids, and loads it twice:

    exact      GPTQModel's plain torch kernel in float32: must equal our dequantized model closely
    default    the kernel and dtype that it picks by itself: must reach the same perplexity

    python scripts/interop_check.py [DIR]         DIR: a checkpoint of `gptq quantize` (default: the demo's)

Exit 0 when they agree, 1 when not. The last line is JSON. It is not one of the tests because it takes minutes
and gigabytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ("torch==2.13.0", "transformers==5.23.0", "optimum==2.3.0", "gptqmodel==7.6.0")
"""GPTQModel 7.7 needs a newer torch. torch comes first, or pip takes the newest with its CUDA packages."""
SETTINGS = {
    "GPTQMODEL_CPU_WORKERS": "2",  # with fewer cores than workers GPTQModel raises
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
MAX_LOGIT_DIFFERENCE = 0.005
"""Exact run: root mean square of the difference over that of the logits. (bfloat16 alone makes it 0.04.)"""
MAX_PERPLEXITY_DIFFERENCE = 0.005
"""Both runs: relative."""


def environment(folder: Path) -> Path:
    """The interpreter of the client's virtual environment, installed unless it is."""
    python = folder / "bin" / "python"
    stamp = folder / ".installed"
    wanted = "\n".join(CLIENT)
    if not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"installing {', '.join(CLIENT)} into {folder.name} (minutes, once)", flush=True)
        venv.create(folder, with_pip=True)
        pip = [
            str(python),
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "-qq",
            "--progress-bar",
            "off",
        ]
        subprocess.run([*pip, CLIENT[0]], check=True)
        subprocess.run([*pip, *CLIENT], check=True)
        stamp.write_text(wanted)
    return python


def measure(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The same few lines for both sides; torch only, no code of ours."""
    import torch

    loss, count, first = 0.0, 0, None
    with torch.inference_mode():
        for window in request["windows"]:
            ids = torch.tensor([window])
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            first = logits if first is None else first
            loss += float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))
            count += len(window) - 1
        prompt = torch.tensor([request["prompt"]])
        greedy = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request["max_new_tokens"],
            do_sample=False,
        )
    return {
        "perplexity": float(torch.tensor(loss / count).exp()),
        "greedy": greedy[0, prompt.shape[1] :].tolist(),
        "logits": first,
    }


def client(request_path: Path) -> None:
    """The client's side; runs in its own environment."""
    import torch
    from transformers import AutoModelForCausalLM, GPTQConfig

    request = json.loads(request_path.read_text())
    results = {}
    for name, options in {
        "exact": {"dtype": torch.float32, "quantization_config": GPTQConfig(bits=4, backend="torch")},
        "default": {"dtype": "auto"},
    }.items():
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], device_map="cpu", **options)
        seconds = time.perf_counter() - started
        kernels = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight")})
        facts = {"load_seconds": seconds, "kernel": ", ".join(kernels), "dtype": str(model.dtype)[6:]}
        results[name] = measure(model.eval(), request) | facts
    torch.save(results, request_path.with_name("client.pt"))


def ours(checkpoint: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Our side: the checkpoint, every linear dequantized, in float32."""
    from gptq_cli.checkpoint.open import open_checkpoint
    from gptq_cli.inference.load import default_placement, load_quantized

    started = time.perf_counter()
    opened = open_checkpoint(checkpoint, dtype="float32")
    model = load_quantized(opened, default_placement(opened), kernel_choice="dequantize")
    facts = {"load_seconds": time.perf_counter() - started, "kernel": "dequantize", "dtype": "float32"}
    return measure(model, request) | facts


def difference(one: Any, other: Any) -> float:  # (T, V) logits
    """Root mean square of `one - other` over that of `other` about its mean."""
    spread = other - other.mean(-1, keepdim=True)
    return float((one - other).square().mean().sqrt() / spread.square().mean().sqrt())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "demo/SmolLM2-135M-Instruct-w4g64")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-interop", help="the client's environment")
    parser.add_argument("--eval", default="pydoc-heldout", help="text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--prompt", default="The quick brown fox")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.client:
        client(options.client)
        return 0
    if not options.checkpoint.is_dir():
        print(f"interop_check: no checkpoint at {options.checkpoint}; run `make demo` first", file=sys.stderr)
        return 2
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from gptq_cli.calibration import evaluation_windows, open_tokenizer

    python = environment(options.venv)
    tokenizer = open_tokenizer(options.checkpoint)
    windows = evaluation_windows(tokenizer, options.eval, options.seq_len, options.windows).input_ids
    request = {
        "checkpoint": str(options.checkpoint.resolve()),
        "windows": windows.tolist(),
        "prompt": tokenizer(options.prompt)["input_ids"],
        "max_new_tokens": options.max_new_tokens,
    }
    with tempfile.TemporaryDirectory(prefix="gptq-interop-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request))
        command = [str(python), str(Path(__file__).resolve()), "--client", str(path)]
        done = subprocess.run(
            command,
            env=os.environ | SETTINGS,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            print(done.stderr[-4000:], file=sys.stderr)
            print("interop_check: the client could not load or run the checkpoint", file=sys.stderr)
            return 1
        theirs = torch.load(Path(folder) / "client.pt")
    mine = ours(options.checkpoint, request)

    exact = theirs["exact"]
    apart = {name: difference(result["logits"], mine["logits"]) for name, result in theirs.items()}
    ratios = [result["perplexity"] / mine["perplexity"] for result in theirs.values()]
    agree = apart["exact"] <= MAX_LOGIT_DIFFERENCE and all(
        abs(ratio - 1) <= MAX_PERPLEXITY_DIFFERENCE for ratio in ratios
    )
    print(f"\n{'':<16}{'kernel':<18}{'dtype':<10}{'perplexity':>12}{'logits apart':>14}{'load':>9}")
    for name, result in {"gptq_cli": mine, **theirs}.items():
        shown = f"{apart[name]:.5f}" if name in apart else ""
        facts = f"{name:<16}{result['kernel']:<18}{result['dtype']:<10}"
        print(f"{facts}{result['perplexity']:>12.4f}{shown:>14}{result['load_seconds']:>7.1f} s")
    for name, result in {"gptq_cli": mine, **theirs}.items():
        print(f"\n{name}: {options.prompt}{tokenizer.decode(result['greedy'])}")
    print(f"\n{'they agree' if agree else 'THEY DO NOT AGREE'}\n")
    summary = {
        "agree": agree,
        "client": list(CLIENT),
        "kernels": {name: result["kernel"] for name, result in theirs.items()},
        "perplexity": {name: round(r["perplexity"], 4) for name, r in {"gptq_cli": mine, **theirs}.items()},
        "logits_apart": {name: round(value, 6) for name, value in apart.items()},
        "same_greedy_text": exact["greedy"] == mine["greedy"],
    }
    print(json.dumps(summary))
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
