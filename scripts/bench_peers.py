#!/usr/bin/env python3
"""The main job, done by `gptq quantize` and by its peers: time, memory and accuracy side by side, as ratios.

Every run gets the same model, calibration token ids, bits and group size, and is a process of its own; one
runs after the other. The checkpoints are then evaluated by one reader on text that no run has seen:

    KL     mean over tokens of KL(dense ‖ quantized), nats
    gap    perplexity of the quantized model over the dense one's, minus 1

On a CPU without fast bf16 the peers get the model in float32, or they would take ten times as long.
A peer is installed into a virtual environment of its own (`.venv-peer-NAME`, on its first run; minutes and
some gigabytes) and uses its own defaults beyond what is listed. Ratios are to the first peer.

    python scripts/bench_peers.py                     the demo model, 128 x 512 tokens, 4 bits, group 64
    python scripts/bench_peers.py --text wiki.txt     calibrate on its first two thirds, evaluate on the rest
    python scripts/bench_peers.py --peers gptqmodel,auto-round --repeats 3
    python scripts/bench_peers.py --recipes "fast,best,best --dense-share 0.5"

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fetch_demo_model import NAME, ROOT, FetchError, fetch

TORCH = "torch==2.13.0"  # first and pinned: pip would take the newest, with its CUDA packages
PEERS = {
    "gptqmodel": ("transformers==5.23.0", "optimum==2.3.0", "gptqmodel==7.6.0"),  # 7.7 wants a newer torch
    "auto-round": ("transformers==5.23.0", "auto-round==0.16.1"),
    "llm-compressor": ("llmcompressor==0.14.0.1",),
}
SETTINGS = {
    "GPTQMODEL_CPU_WORKERS": "2",  # with fewer cores than workers GPTQModel raises
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
AUTO_ROUND_STEPS = 50
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Cost:
    """What one process used."""

    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Quality:
    """How far a checkpoint is from the dense model, on held-out text."""

    kl: float
    top1: float
    perplexity: float
    dense_perplexity: float

    @property
    def gap(self) -> float:
        """Relative rise of the perplexity."""
        return self.perplexity / self.dense_perplexity - 1


def measured(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Cost:
    """Run to the end in a process of its own; a failure ends the benchmark with the end of its log."""
    with log.open("wb") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, cwd=log.parent
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"bench_peers: exit {process.returncode} of {' '.join(command)}\n{end}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * MAXRSS_UNIT)


def environment_of(peer: str) -> Path:
    """The interpreter of a peer's virtual environment, installed unless it is."""
    folder = ROOT / f".venv-peer-{peer}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join((TORCH, *PEERS[peer]))
    if not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"installing {wanted.split()[-1]} into {folder.name} (minutes, once)", flush=True)
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
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, TORCH, *PEERS[peer]], check=True)
        stamp.write_text(wanted)
    return python


# -- what runs in a peer's environment


def with_gptqmodel(job: dict[str, Any]) -> None:
    """GPTQModel's documented way, with its defaults."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=job["bits"], group_size=job["group_size"], sym=True, desc_act=job["desc_act"]
    )
    model = GPTQModel.load(job["model"], config, dtype=getattr(torch, job["dtype"]))
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["ids"]], batch_size=1)
    model.save(job["out"])


def with_auto_round(job: dict[str, Any]) -> None:
    """Gradient-tuned rounding; not GPTQ, but the accuracy to beat. Written in the same format."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ids = torch.tensor(job["ids"])
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    rounding = AutoRound(
        model, tokenizer, bits=job["bits"], group_size=job["group_size"], sym=True, iters=AUTO_ROUND_STEPS,
        dataset=samples, nsamples=ids.shape[0], seqlen=ids.shape[1], device_map="cpu",
    )  # fmt: skip
    rounding.quantize_and_save(job["out"], format="auto_gptq")


def with_llm_compressor(job: dict[str, Any]) -> None:
    """Its GPTQ modifier; writes compressed-tensors, so its own environment evaluates it too."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    weights = {"num_bits": job["bits"], "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": job["group_size"], "actorder": None}
    modifier = GPTQModifier(
        ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}
    )
    samples = {"input_ids": job["ids"], "attention_mask": [[1] * len(ids) for ids in job["ids"]]}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    oneshot(
        model=model, dataset=Dataset.from_dict(samples), recipe=modifier,
        max_seq_length=len(job["ids"][0]), num_calibration_samples=len(job["ids"]),
    )  # fmt: skip
    model.save_pretrained(job["out"], save_compressed=True)


CLIENTS = {"gptqmodel": with_gptqmodel, "auto-round": with_auto_round, "llm-compressor": with_llm_compressor}


# -- evaluating


def evaluate(job: dict[str, Any], checkpoint: Path, *, transformers: bool) -> Quality:
    """Compare a checkpoint with the dense model; `transformers`: opened by Transformers, not by us."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import AutoModelForCausalLM

    from gptq_cli.evaluation.divergence import compare

    dense = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").eval()
    if transformers:
        quantized = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    else:
        import gptq_cli

        quantized = gptq_cli.load(str(checkpoint))
    found = compare(quantized, dense, torch.tensor(job["windows"]))
    return Quality(found.kl, found.top1, found.perplexity, found.dense_perplexity)


def peer_dtype() -> str:
    """bfloat16, as the model is stored; float32 where this CPU would multiply bf16 matrices many times slower
    and a peer would spend hours at it. `gptq` is given no such choice: it finds out by itself.
    """
    import torch

    from gptq_cli.gptq.matmul import fast_matmul_supported

    return "bfloat16" if fast_matmul_supported(torch.bfloat16, "cpu") else "float32"


def texts(options: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """The calibration source and the source to evaluate on; they share no text."""
    if options.text is None:
        return "pydoc", "pydoc-heldout"
    lines = options.text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = 2 * len(lines) // 3
    for name, part in (("calibration.txt", lines[:cut]), ("held-out.txt", lines[cut:])):
        (folder / name).write_text("".join(part), encoding="utf-8")
    return str(folder / "calibration.txt"), str(folder / "held-out.txt")


def token_ids(options: argparse.Namespace, model: Path, calibration: str, held_out: str) -> dict[str, Any]:
    """What every run gets: exactly the windows that `gptq quantize` cuts itself, and those to evaluate on."""
    from gptq_cli.calibration import evaluation_windows, make_batches, open_tokenizer
    from gptq_cli.config import CalibrationConfig

    tokenizer = open_tokenizer(model)
    wanted = CalibrationConfig.of(calibration, samples=options.samples, seq_len=options.seq_len)
    windows = evaluation_windows(tokenizer, held_out, options.eval_seq_len, options.windows)
    return {
        "ids": make_batches(tokenizer, wanted).input_ids.tolist(),
        "windows": windows.input_ids.tolist(),
    }


def runs(options: argparse.Namespace, job: dict[str, Any], calibration: str) -> dict[str, list[str]]:
    """The command of every run, by name; OUT and JOB are filled in when it starts."""
    commands = {}
    for peer in options.peers:
        python = str(environment_of(peer))
        commands[peer] = [python, str(Path(__file__).resolve()), "--client", peer, "JOB", "OUT"]
    for recipe in options.recipes:
        commands[f"gptq {recipe}"] = [
            sys.executable, "-m", "gptq_cli", "quantize", job["model"], "--recipe", *recipe.split(),
            "--bits", str(options.bits), "--group-size", str(options.group_size),
            "--calibration", calibration,
            "--samples", str(options.samples), "--seq-len", str(options.seq_len),
            *(["--desc-act"] if options.desc_act else []),
            "--out", "OUT", "--overwrite", "--json", "--progress", "none",
        ]  # fmt: skip
    return commands


def evaluated_apart(name: str, request: Path, out: Path) -> Quality:
    """Evaluate in a process of its own: a peer that writes another format is read in its own environment."""
    own_format = name == "llm-compressor"
    python = str(environment_of(name)) if own_format else sys.executable
    command = [python, str(Path(__file__).resolve()), "--evaluate", str(own_format), str(request), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | SETTINGS)
    return Quality(**json.loads(done.stdout.splitlines()[-1]))


def parse(argv: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a dense model directory (default: SmolLM2, fetched)")
    parser.add_argument("--text", type=Path, help="a text file (default: pydoc and pydoc-heldout)")
    parser.add_argument("--peers", type=names, default=["gptqmodel"], help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--recipes",
        type=names,
        default=["fast", "balanced", "best"],
        help="each with more options of gptq quantize if you like",
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1, help="the median of so many is shown")
    parser.add_argument("--keep", type=Path, help="work here, leave checkpoints and logs")
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = [peer for peer in options.peers if peer not in PEERS]
    if unknown:
        parser.error(f"--peers {','.join(unknown)}: allowed are {', '.join(PEERS)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.client:
        peer, request, out = options.client
        CLIENTS[peer](json.loads(Path(request).read_text()) | {"out": out})
        return 0
    if options.evaluate:
        own, request, out = options.evaluate
        print(
            json.dumps(
                asdict(evaluate(json.loads(Path(request).read_text()), Path(out), transformers=own == "True"))
            )
        )
        return 0
    try:
        model = options.model or fetch(ROOT / "demo" / NAME, ROOT / "demo" / "cache")
    except FetchError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        return 1
    folder = options.keep or Path(tempfile.mkdtemp(prefix="gptq-peers-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        summary = bench(options, model.resolve(), folder)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(summary))
    return 0


def bench(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """Every run in turn, as often as asked; then the table."""
    calibration, held_out = texts(options, folder)
    job: dict[str, Any] = {
        "model": str(model),
        "bits": options.bits,
        "group_size": options.group_size,
        "desc_act": options.desc_act,
        "dtype": peer_dtype(),
        **token_ids(options, model, calibration, held_out),
    }
    request = folder / "request.json"
    request.write_text(json.dumps(job))
    commands = runs(options, job, calibration)
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(options.repeats):
        for name, command in commands.items():
            out = folder / name.replace(" ", "-")
            filled = [{"OUT": str(out), "JOB": str(request)}.get(word, word) for word in command]
            if name in PEERS:
                shutil.rmtree(out, ignore_errors=True)
            costs[name].append(measured(filled, folder / f"{out.name}.log", os.environ | SETTINGS))
            print(f"{name}: {costs[name][-1].wall_seconds:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    quality = {name: evaluated_apart(name, request, folder / name.replace(" ", "-")) for name in commands}
    return report(options, model, costs, quality)


def report(
    options: argparse.Namespace, model: Path, costs: dict[str, list[Cost]], quality: dict[str, Quality]
) -> dict[str, Any]:
    """The table for a person, the same figures for a program."""
    middle = {
        name: sorted(found, key=lambda cost: cost.wall_seconds)[len(found) // 2]
        for name, found in costs.items()
    }
    base = next(iter(middle))
    print(
        f"\n{model.name}: {options.bits} bits, group {options.group_size},"
        f" {options.samples} x {options.seq_len} tokens;"
        f" evaluated on {options.windows} x {options.eval_seq_len}; ratios to {base};"
        f" peers in {peer_dtype()}\n"
    )
    heads = (("wall s", 8), ("cpu s", 8), ("GiB", 7), ("KL", 9), ("gap", 9))
    width = max(16, *(len(name) + 2 for name in middle))
    print(" " * width + "".join(f"{head:>{size}}{'':>7}" for head, size in heads) + f"{'ppl':>9}")
    summary: dict[str, Any] = {"model": model.name, "base": base, "peer_dtype": peer_dtype(), "runs": {}}
    for name, cost in middle.items():
        mine, first = quality[name], quality[base]
        pairs = [
            (cost.wall_seconds, middle[base].wall_seconds, "8.1f"),
            (cost.cpu_seconds, middle[base].cpu_seconds, "8.1f"),
            (cost.peak_rss_bytes / 2**30, middle[base].peak_rss_bytes / 2**30, "7.2f"),
            (mine.kl, first.kl, "9.4f"),
            (mine.gap, first.gap, "9.2%"),
        ]
        line = "".join(f"{value:{form}}{f'x{value / of:.2f}':>7}" for value, of, form in pairs)
        print(f"{name:<{width}}{line}{mine.perplexity:>9.3f}")
        summary["runs"][name] = {
            **asdict(cost), **asdict(mine), "gap": mine.gap,
            "ratios": {
                key: round(value / of, 3)
                for key, (value, of, _) in zip(("wall", "cpu", "rss", "kl", "gap"), pairs, strict=True)
            },
        }  # fmt: skip
    print(f"{'dense':<{width}}{'':>76}{quality[base].dense_perplexity:>9.3f}\n")
    return summary


if __name__ == "__main__":
    raise SystemExit(main())
