#!/usr/bin/env python3
"""Load time, memory and speed of a packed checkpoint against the dense bf16 model, in one run.

    python scripts/bench_load.py                    a random model of 4096 x 4096 linears, built on the fly
    python scripts/bench_load.py --small DIR        also a real small model: a dense directory (SmolLM2-135M)
    python scripts/bench_load.py --peer-python PY   also Transformers + GPTQModel, run by that interpreter

Every figure is measured in a process of its own: dense, packed and peer take turns, `--turns` times. Reported
are the median of rates and sizes over the turns, and the shortest loading time. Load time runs from the start
of the process until the model is ready, and is compared with a process that imports torch and transformers
and reads the same file. Memory is the resident set size after loading and running, less the one after the
imports. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BORN = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "decode, large blocks": (">=", 1.5),
    "prompt, large blocks": (">=", 0.7),
    "memory, large blocks": ("<=", 0.45),
    "load time, large blocks": ("<=", 1.3),
    "decode, small model": (">=", 0.9),
    "prompt, small model": (">=", 0.7),
    "load time, small model": ("<=", 1.3),
    "decode against Transformers + GPTQModel": (">=", 2.0),
}
"""Ratios packed / dense, except load time: packed / (imports + reading the file)."""


def resident_bytes() -> int:
    """Resident set size of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Highest resident set size so far; getrusage would count the parent of a fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def say(text: str) -> None:
    """Progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


# -- what a child process measures ----------------------------------------------------------------


def read_only(directory: Path) -> dict[str, Any]:
    """Import torch and what every Transformers model is made of, and read the weights."""
    import torch  # noqa: F401
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401  (it is lazy)

    transformers.logging.set_verbosity_error()
    imported = time.perf_counter()
    buffer = bytearray(1 << 22)
    size = 0
    for shard in sorted(directory.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    done = time.perf_counter()
    return {"import_seconds": imported - BORN, "read_seconds": done - imported, "file_bytes": size}


def measure(kind: str, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the model of `directory` as `kind` (packed, dense, peer) and time it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if kind == "packed":
        from gptq_cli.checkpoint.open import open_checkpoint
        from gptq_cli.inference.load import default_placement, kernel_counts, load_quantized

        before = resident_bytes()
        started = time.perf_counter()
        checkpoint = open_checkpoint(directory, dtype="bfloat16")
        model = load_quantized(checkpoint, default_placement(checkpoint))
        extra = {"kernels": [f"{k.linears} x {k.kernel}: {k.reason}" for k in kernel_counts(model)]}
    else:
        from transformers import AutoModelForCausalLM

        before = resident_bytes()
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        extra = {}
    ready = time.perf_counter()
    after = resident_bytes()
    peak = peak_bytes()
    prompt, decode = speed(model, arguments)
    return extra | {
        "process_to_ready_seconds": ready - BORN,
        "load_seconds": ready - started,
        "resident_bytes": after - before,
        "resident_warm_bytes": resident_bytes() - before,
        "peak_bytes": peak - before,
        "prompt_tokens_per_second": prompt,
        "decode_tokens_per_second": decode,
    }


def speed(model: Any, arguments: argparse.Namespace) -> tuple[float, float]:
    """Medians of prompt and decode tokens per second; the same loop for every kind of model."""
    import torch

    from gptq_cli.model.running import cache_name

    name = cache_name(model) or ""
    ids = torch.randint(
        0, model.config.vocab_size, (1, arguments.prompt), generator=torch.Generator().manual_seed(0)
    )
    prompts: list[float] = []
    decodes: list[float] = []
    with torch.inference_mode():
        for number in range(arguments.rounds + 1):
            started = time.perf_counter()
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            middle = time.perf_counter()
            token = ids[:, -1:]
            for _ in range(arguments.tokens):
                out = model(input_ids=token, use_cache=True, **{name: getattr(out, name)})
                token = out.logits[:, -1:].argmax(-1)
            done = time.perf_counter()
            if number:
                prompts.append(arguments.prompt / (middle - started))
                decodes.append(arguments.tokens / (done - middle))
    return statistics.median(prompts), statistics.median(decodes)


# -- models ---------------------------------------------------------------------------------------


def make_large(directory: Path, layers: int) -> None:
    """A random Llama whose linears are all 4096 x 4096, bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=4096,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def quantize_plainly(source: Path, target: Path, group_size: int) -> None:
    """Round every linear of the blocks to the nearest of 16 codes: a checkpoint in seconds, not minutes."""
    import torch
    from safetensors.torch import load_file, save_file

    from gptq_cli.gptq.packing import PackedTensors, pack_rows

    def packed(weight: Any) -> PackedTensors:
        rows, columns = weight.shape
        groups = weight.float().view(rows, columns // group_size, group_size)
        scales = (groups.abs().amax(2) / 7.5).clamp_min(1e-8).half()
        codes = (groups / scales.float().unsqueeze(2) + 8).round().clamp(0, 15).to(torch.uint8)
        words = -(-rows * 4 // 32)
        return PackedTensors(
            qweight=pack_rows(codes.view(rows, columns).T.contiguous(), 4),
            qzeros=torch.full((columns // group_size, words), 0x77777777, dtype=torch.int32),
            scales=scales.T.contiguous(),
            g_idx=(torch.arange(columns) // group_size).int(),
        )

    target.mkdir(parents=True)
    result: dict[str, Any] = {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            if name.endswith("_proj.weight"):
                linear = packed(tensor)
                for part in ("qweight", "qzeros", "scales", "g_idx"):
                    result[f"{name.removesuffix('.weight')}.{part}"] = getattr(linear, part)
            else:
                result[name] = tensor
    save_file(result, target / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
    }
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and "index" not in path.name:
            shutil.copy(path, target / path.name)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}, indent=2))
    (target / "quantize_config.json").write_text(json.dumps(quantization, indent=2))


# -- the run --------------------------------------------------------------------------------------


def child(kind: str, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    python = arguments.peer_python if kind == "peer" else sys.executable
    command = [python, __file__, "--measure", kind, str(directory)]
    for name in ("prompt", "tokens", "rounds", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    if kind != "peer":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the {kind} measurement failed with exit {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def settled(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the turns: the shortest of every time, the median of other numbers; other fields of the last."""
    result: dict[str, Any] = {}
    for key, value in turns[-1].items():
        if isinstance(value, int | float):
            pick = min if key.endswith("_seconds") else statistics.median
            result[key] = pick(turn[key] for turn in turns)
        else:
            result[key] = value
    return result


def compare(dense: Path, packed: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Take turns, and put the medians side by side."""
    kinds = ["read", "dense", "packed", *(["peer"] if arguments.peer_python else [])]
    turns: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(arguments.turns):
        for kind in kinds:
            say(f"  turn {number + 1} of {arguments.turns}: {kind}")
            turns[kind].append(child(kind, dense if kind == "dense" else packed, arguments))
    found: dict[str, Any] = {kind: settled(turns[kind]) for kind in kinds}
    floor = found["read"]["import_seconds"] + found["read"]["read_seconds"]
    ratios = {
        "decode": found["packed"]["decode_tokens_per_second"] / found["dense"]["decode_tokens_per_second"],
        "prompt": found["packed"]["prompt_tokens_per_second"] / found["dense"]["prompt_tokens_per_second"],
        "memory": found["packed"]["resident_warm_bytes"] / found["dense"]["resident_warm_bytes"],
        "peak": found["packed"]["peak_bytes"] / found["read"]["file_bytes"],
        "load time": found["packed"]["process_to_ready_seconds"] / floor,
    }
    if "peer" in found:
        ratios["decode against Transformers + GPTQModel"] = (
            found["packed"]["decode_tokens_per_second"] / found["peer"]["decode_tokens_per_second"]
        )
    return {"ratios": ratios, **found}


def checked(label: str, ratios: dict[str, float]) -> dict[str, Any]:
    """Every ratio that has a target, and whether it is met."""
    result: dict[str, Any] = {}
    for name, value in ratios.items():
        full = name if name in TARGETS else f"{name}, {label}"
        if full not in TARGETS:
            continue
        sign, wanted = TARGETS[full]
        met = value >= wanted if sign == ">=" else value <= wanted
        result[full] = {"value": round(value, 3), "target": f"{sign} {wanted}", "met": met}
        say(f"  {full}: {value:.2f} (target {sign} {wanted}) {'ok' if met else 'MISSED'}")
    return result


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="blocks of the random model (default 4)")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--small", type=Path, help="a dense directory of a small real model")
    parser.add_argument("--small-group-size", type=int, default=64)
    parser.add_argument("--peer-python", help="an interpreter that has transformers, optimum and gptqmodel")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens (default 512)")
    parser.add_argument("--tokens", type=int, default=16, help="decoded tokens of a round (default 16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="build the models here and leave them")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, directory = arguments.measure[0], Path(arguments.measure[1])
        result = read_only(directory) if kind == "read" else measure(kind, directory, arguments)
        print(json.dumps(result))
        return
    sys.path.insert(0, str(ROOT))
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="bench-load-"))
    try:
        document = run(folder, arguments)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(document))


def run(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both models, one after the other."""
    import torch

    document: dict[str, Any] = {"threads": arguments.threads, "torch": torch.__version__, "targets": {}}
    cases: list[tuple[str, Path, int]] = []
    large = folder / "large"
    if not large.exists():
        say(f"building {arguments.layers} blocks of 4096 x 4096 linears in {folder}")
        make_large(large, arguments.layers)
    cases.append(("large blocks", large, arguments.group_size))
    if arguments.small:
        cases.append(("small model", arguments.small, arguments.small_group_size))
    for label, dense, group_size in cases:
        packed = folder / f"{label.replace(' ', '-')}-g{group_size}"
        if not packed.exists():
            quantize_plainly(dense, packed, group_size)
        say(f"{label}: {dense}")
        document[label] = compare(dense, packed, arguments)
        document["targets"] |= checked(label, document[label]["ratios"])
    return document


if __name__ == "__main__":
    main()
