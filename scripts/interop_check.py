#!/usr/bin/env python3
"""Does a client that we did not write load our checkpoint, and compute the same?

The client is Transformers with optimum and GPTQModel on the CPU, in a virtual environment of its own
(`.venv-interop`, made on the first run; minutes and 2 GB). It gets nothing from us but the checkpoint
directory and token ids, and hands back perplexity, greedy tokens, and the logits of one window. This script
computes the same with `gptq_cli`, every linear dequantized, and compares.

    python scripts/interop_check.py [DIR]         DIR: a checkpoint of `gptq quantize` (default: the demo's)

Exit 0 when they agree, 1 when not. The last line is JSON. The run is outside the tests because of its weight.
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
"""GPTQModel 7.7 wants a newer torch. torch comes first, or pip takes the newest with its CUDA packages."""
SETTINGS = {
    "GPTQMODEL_CPU_WORKERS": "2",  # with fewer cores than workers GPTQModel raises
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
MOST_LOGIT_DIFFERENCE = 0.02
"""Root mean square of the difference, relative to that of the logits: kernels round in different places."""
MOST_PERPLEXITY_DIFFERENCE = 0.005


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

    loss, count = 0.0, 0
    with torch.inference_mode():
        for window in request["windows"]:
            ids = torch.tensor([window])
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            loss += float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))
            count += len(window) - 1
        prompt = torch.tensor([request["prompt"]])
        greedy = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request["max_new_tokens"],
            do_sample=False,
        )
        first = model(input_ids=torch.tensor(request["windows"][:1]), use_cache=False).logits[0].float()
    return {
        "perplexity": float(torch.tensor(loss / count).exp()),
        "greedy": greedy[0, prompt.shape[1] :].tolist(),
        "logits": first,
    }


def client(request_path: Path) -> None:
    """The client's side; runs in its own environment."""
    import torch
    from transformers import AutoModelForCausalLM

    request = json.loads(request_path.read_text())
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        request["checkpoint"], device_map="cpu", dtype=torch.bfloat16
    )
    seconds = time.perf_counter() - started
    kinds = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight")})
    result = measure(model.eval(), request)
    torch.save(result | {"load_seconds": seconds, "kernels": kinds}, request_path.with_name("client.pt"))


def ours(checkpoint: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Our side: the checkpoint, every linear dequantized."""
    from gptq_cli.inference.opening import default_placement, load_quantized
    from gptq_cli.model.reader import open_checkpoint

    opened = open_checkpoint(checkpoint, dtype="bfloat16")
    return measure(load_quantized(opened, default_placement(opened), wish="dequantize"), request)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "demo/SmolLM2-135M-Instruct-w4g64")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-interop", help="the client's environment")
    parser.add_argument("--eval", default="pydoc-heldout", help="text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--prompt", default="The quick brown fox")
    parser.add_argument("--max-new-tokens", type=int, default=48)
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

    difference = theirs["logits"] - mine["logits"]
    spread = mine["logits"] - mine["logits"].mean(-1, keepdim=True)
    relative = float(difference.square().mean().sqrt() / spread.square().mean().sqrt())
    top = float((theirs["logits"].argmax(-1) == mine["logits"].argmax(-1)).float().mean())
    ratio = theirs["perplexity"] / mine["perplexity"]
    agree = relative <= MOST_LOGIT_DIFFERENCE and abs(ratio - 1) <= MOST_PERPLEXITY_DIFFERENCE
    print(f"\n{'':<22}{'Transformers':>14}{'gptq_cli':>14}")
    print(f"{'perplexity':<22}{theirs['perplexity']:>14.4f}{mine['perplexity']:>14.4f}")
    print(f"{'logits apart (rms)':<22}{relative:>14.5f}   at most {MOST_LOGIT_DIFFERENCE}")
    print(f"{'same top token':<22}{100 * top:>13.1f}%")
    print(f"{'kernels':<22}{', '.join(theirs['kernels']):>14}")
    print(f"{'load seconds':<22}{theirs['load_seconds']:>14.1f}")
    for name, result in (("Transformers", theirs), ("gptq_cli", mine)):
        print(f"\n{name}: {options.prompt}{tokenizer.decode(result['greedy'])}")
    print(f"\n{'they agree' if agree else 'THEY DO NOT AGREE'}\n")
    summary = {
        "agree": agree,
        "client": list(CLIENT),
        "kernels": theirs["kernels"],
        "perplexity_client": round(theirs["perplexity"], 4),
        "perplexity_gptq_cli": round(mine["perplexity"], 4),
        "logit_difference": round(relative, 6),
        "same_top_token": round(top, 4),
        "same_greedy_text": theirs["greedy"] == mine["greedy"],
    }
    print(json.dumps(summary))
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
