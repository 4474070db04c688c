#!/usr/bin/env python3
"""How much main memory a run takes whose model file is larger than the memory that it may use.

Writes a random Llama of 8B-shaped blocks (hidden 4096, inner 14336, bfloat16) with a wide vocabulary, sets a
limit on the data of a process (RLIMIT_DATA) below the size of the file, and quantizes in it, on the CPU or on
the make-believe CUDA of the tests, whose memory is no data of the process. The peak of its main memory is
compared with what streaming promises at most: the embedding, two blocks, the hidden states, and 1 GiB for
everything else. The last line is JSON.

    python scripts/bench_streaming.py                     two blocks, some minutes on two cores
    python scripts/bench_streaming.py --simulated --vocab 128256 --limit-gib 2
    python scripts/bench_streaming.py --hidden 512 --inner 1024 --limit-gib 0   a small one, without a limit
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GIB = 1 << 30
DEVICE_BYTES = 8 * GIB
"""Of the make-believe device: that of the smallest card on which an 8B is quantized."""
ROOT = Path(__file__).resolve().parent.parent
RUN = """
import json, resource, sys, threading, time
from pathlib import Path
limit, device_bytes = int(sys.argv[1]), int(sys.argv[2])
if device_bytes:
    from tests.fakecuda.devices import install
    install([device_bytes])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from gptq_cli.cli.app import main

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: int(words.split()[0]) << 10 for key, _, words in (line.partition(":") for line in lines)
            if key.startswith(("Vm", "Rss"))}

peak = 0
def watch():
    global peak
    while True:
        now = memory()
        peak = max(peak, now["VmRSS"] - now["RssShmem"])
        time.sleep(0.005)

if device_bytes:
    threading.Thread(target=watch, daemon=True).start()
code = main(sys.argv[3:])
print(json.dumps({"peak_bytes": peak or memory()["VmHWM"], "code": code}))
"""
OWN = {"own": ("--recipe", "fast", "--solve-for", "own")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=256_000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--limit-gib", type=float, default=4.25, help="of data; 0: none")
    parser.add_argument("--simulated", action="store_true", help="on the make-believe CUDA, not on the CPU")
    parser.add_argument(
        "--recipe",
        default="own",
        choices=("own", "fast", "balanced", "best"),
        help="own: fast with --solve-for own, which takes the least",
    )
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="gptq-bench-") as folder:
        model = Path(folder) / "model"
        sizes = write_model(model, asked)
        limit = int(asked.limit_gib * GIB)
        command = [
            *(sys.executable, "-c", RUN, str(limit), str(DEVICE_BYTES if asked.simulated else 0)),
            *("quantize", str(model), "--out", f"{folder}/out"),
            *(
                "--device-map",
                "cuda:0" if asked.simulated else "cpu",
                *OWN.get(asked.recipe, ("--recipe", asked.recipe)),
                "--calibration",
                f"{folder}/model/text.txt",
            ),
            *("--samples", str(asked.samples), "--seq-len", str(asked.seq_len)),
            *("--json", "--progress", "none"),
        ]
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": paths},
        )
        result = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"code": done.returncode}
        if result["code"] != 0:
            return int(result["code"]) or 1
        report = json.loads((Path(folder) / "out" / "report.json").read_text())
    hidden = asked.samples * asked.seq_len * asked.hidden * 2
    promised = sizes["embedding"] + 2 * sizes["block"] + hidden + GIB
    found = {
        "file_bytes": sizes["file"],
        "limit_bytes": limit,
        "embedding_bytes": sizes["embedding"],
        "block_bytes": sizes["block"],
        "hidden_bytes": hidden,
        "promised_bytes": promised,
        "predicted_bytes": dict(report["predicted_peak_bytes"])["cpu"],
        "peak_bytes": result["peak_bytes"],
        **({"device_peak_bytes": dict(report["measured_peak_bytes"])["cuda:0"]} if asked.simulated else {}),
        "seconds": report["seconds"],
    }
    for name, value in found.items():
        words = f"{value:.0f} s" if name == "seconds" else f"{value / GIB:.2f} GiB"
        print(f"  {name.removesuffix('_bytes'):<13}{words:>10}")
    print(json.dumps({**found, "kept": result["peak_bytes"] <= promised}))
    return 0 if result["peak_bytes"] <= promised else 1


def write_model(path: Path, asked: argparse.Namespace) -> dict[str, int]:
    """A random model, written tensor by tensor; the bytes of its file, its embedding and a block."""
    import torch

    from gptq_cli.model.headers import build_header

    path.mkdir(parents=True)
    hidden, inner, heads = asked.hidden, asked.inner, asked.hidden // 128
    keys = 128 * max(1, heads // 4)
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (asked.vocab, hidden)}
    for index in range(asked.blocks):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (asked.vocab, hidden)}
    header, places = build_header({name: ("bfloat16", shape) for name, shape in shapes.items()})
    generator = torch.Generator().manual_seed(0)
    with (path / "model.safetensors").open("wb") as file:
        file.write(header)
        for name, (begin, _) in places.items():
            file.seek(begin)
            rows, *columns = shapes[name]
            for start in range(0, rows, 4096):
                size = (min(4096, rows - start), *columns)
                if columns:
                    part = torch.randn(size, generator=generator) / columns[0] ** 0.5
                else:
                    part = torch.ones(size)
                file.write(part.bfloat16().view(torch.uint8).numpy().tobytes())
    _write_config(path, asked, heads, keys // 128)
    return {
        "file": (path / "model.safetensors").stat().st_size,
        "embedding": 2 * asked.vocab * hidden,
        "block": 2 * sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in block.values()),
    }


def _write_config(path: Path, asked: argparse.Namespace, heads: int, key_heads: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": asked.vocab,
        "hidden_size": asked.hidden,
        "intermediate_size": asked.inner,
        "num_hidden_layers": asked.blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    bytes_of_text = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(bytes_of_text)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    (path / "text.txt").write_text("".join(f"{number} is a number; " for number in range(60_000)))


if __name__ == "__main__":
    sys.exit(main())
