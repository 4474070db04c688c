#!/usr/bin/env python3
"""Do we read what GPTQModel writes? Small models quantized there, in every format, and read on both sides.

GPTQModel quantizes a small random Llama in its own virtual environment (`.venv-interop`, shared with
interop_check.py), saves it, reads it back and records the logits of its own reader. Then `gptq` opens the
same directory, and must agree.

    python scripts/interop_read.py            all cases, some seconds each once the environment is there
    python scripts/interop_read.py --keep DIR leave the checkpoints

Exit 0 when every case agrees, 1 when not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from interop_check import ROOT, SETTINGS, difference, environment

CASES: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 32},
    "4 bits, one group per row": {"bits": 4, "group_size": -1, "act_group_aware": False},
    "4 bits, desc_act": {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False},
    "4 bits, asymmetric": {"bits": 4, "group_size": 32, "sym": False},
    "4 bits, format v2": {"bits": 4, "group_size": 32, "format": "gptq_v2"},
    "2 bits": {"bits": 2, "group_size": 32},
    "3 bits": {"bits": 3, "group_size": 32},
    "8 bits": {"bits": 8, "group_size": 64},
    "dynamic": {
        "bits": 4,
        "group_size": 32,
        "dynamic": {r"+:.*\.1\.mlp.*": {"bits": 8, "group_size": 64}, r"-:.*\.0\.mlp\.down_proj": {}},
    },
    "quantized lm_head": {"bits": 4, "group_size": 32, "lm_head": True},
}
MAX_DIFFERENCE = 0.01
"""Root mean square of the logits' difference over that of the logits; their reader runs in float16."""


def client(source: Path, target: Path, case: dict[str, Any]) -> None:
    """GPTQModel's side: quantize, save, read back, record."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.utils.backend import BACKEND

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 500, (64,), generator=generator).tolist() for _ in range(16)]
    model = GPTQModel.load(str(source), QuantizeConfig(**case))
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    model.save(str(target))
    del model
    model = GPTQModel.load(str(target), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    ids = torch.randint(2, 500, (2, 16), generator=generator)
    with torch.inference_mode():
        logits = model.model(input_ids=ids, use_cache=False).logits.float()
    torch.save({"ids": ids, "logits": logits}, target / "expected.pt")


def make_source(folder: Path) -> None:
    """A Llama of two blocks with random but structured weights, in float16."""
    import torch
    import transformers

    from tests.tiny import randomize, save_tokenizer

    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0)
    model.to(torch.float16).save_pretrained(folder)
    save_tokenizer(folder)


def ours(checkpoint: Path) -> tuple[dict[str, float], str]:
    """The difference between our logits and theirs, by dtype, and the result of verification."""
    import torch

    from gptq_cli.checkpoint.open import open_checkpoint
    from gptq_cli.checkpoint.verify import verify_checkpoint
    from gptq_cli.inference.load import default_placement, load_quantized

    expected = torch.load(checkpoint / "expected.pt")
    apart = {}
    for dtype in ("float32", "bfloat16"):
        opened = open_checkpoint(checkpoint, dtype=dtype)
        model = load_quantized(opened, default_placement(opened))
        with torch.inference_mode():
            logits = model(input_ids=expected["ids"], use_cache=False).logits.float()
        apart[dtype] = difference(logits.flatten(0, 1), expected["logits"].flatten(0, 1))
    report = verify_checkpoint(checkpoint)
    loud = [f"{f.rule}: {f.message}" for f in report.findings if f.level != "note"]
    return apart, "; ".join(loud) or "clean"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-interop", help="GPTQModel's environment")
    parser.add_argument("--keep", type=Path, help="work here and leave the checkpoints")
    parser.add_argument("--only", action="append", choices=sorted(CASES), help="one case; may be repeated")
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client(Path(options.client[0]), Path(options.client[1]), json.loads(options.client[2]))
        return 0
    sys.path.insert(0, str(ROOT))
    python = environment(options.venv)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="gptq-interop-"))
    summary: dict[str, Any] = {}
    try:
        make_source(folder / "source")
        print(f"\n{'case':<26}{'float32':>10}{'bfloat16':>10}  verify")
        for number, name in enumerate(options.only or CASES):
            summary[name] = one_case(python, folder, f"case-{number}", name)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    good = all(result["agree"] for result in summary.values())
    print(json.dumps({"agree": good, "cases": summary}))
    return 0 if good else 1


def one_case(python: Path, folder: Path, place: str, name: str) -> dict[str, Any]:
    """Quantize there, read here."""
    target = folder / place
    request = [str(folder / "source"), str(target), json.dumps(CASES[name])]
    done = subprocess.run(
        [str(python), str(Path(__file__).resolve()), "--client", *request],
        env=os.environ | SETTINGS,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(f"{name:<26} GPTQModel failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return {"agree": False, "failed": "there"}
    apart, verdict = ours(target)
    agree = apart["float32"] <= MAX_DIFFERENCE and apart["bfloat16"] <= 10 * MAX_DIFFERENCE
    print(f"{name:<26}{apart['float32']:>10.5f}{apart['bfloat16']:>10.5f}  {verdict}", flush=True)
    return {"agree": agree, "verify": verdict, **{k: round(v, 6) for k, v in apart.items()}}


if __name__ == "__main__":
    raise SystemExit(main())
