#!/usr/bin/env python3
"""What one process and two that work together take, phase by phase, and the bytes that travel.

    python scripts/bench_ranks.py [--hidden 256] [--layers 2] [--samples 64] [--seq-len 256]

A Llama with random weights is quantized in this process alone, as a rank of one (`leaves`: sums in a tree),
and by two processes over gloo on the CPU, each with one thread: threads of several processes that wait for
each other on cores that are taken would be measured instead. Times are processor time, which other work on
the machine does not lengthen as it does the time on the wall; waiting for another rank is not in it, but for
what looking for its answer takes. They are also given as ratios to one process without a launcher. Bytes are
set beside the formula. On one machine no speed-up is to be expected: what is measured is the overhead. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig
from gptq_cli.model.describe import model_facts
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement, PlacementEntry
from gptq_cli.planning.cases import Work
from gptq_cli.planning.schedule import WAYS, make_schedule
from gptq_cli.planning.traffic import block_traffic

WORDS = ("--calibration", "pydoc", "--progress", "none", "--card", "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 2), ("samples", 64), ("seq-len", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save(model, asked.hidden, asked.layers)
        words = (*WORDS, "--samples", str(asked.samples), "--seq-len", str(asked.seq_len))
        found = {name: run(Path(folder), model, ranks, words) for name, ranks in RUNS.items()}
        config = QuantizeConfig.of("balanced")
        calibration = CalibrationConfig(samples=asked.samples, seq_len=asked.seq_len)
        found["formula"] = formula(model, Work(config, calibration))
    found["ratios"] = ratios(found)
    print(json.dumps(found))


RUNS = {"plain": 0, "leaves": 1, "two": 2}


def save(path: Path, hidden: int, layers: int) -> None:
    """A Llama of random weights with a real tokenizer."""
    from tests.tiny import VOCAB, save_tokenizer

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCAB,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    save_tokenizer(path)


def run(folder: Path, model: Path, ranks: int, words: tuple[str, ...]) -> dict[str, Any]:
    """One run; `ranks` 0: without a launcher. Of each rank its processor time by phase, and its traffic."""
    out = folder / f"out-{ranks}"
    notes = [folder / f"notes-{ranks}-{rank}" for rank in range(max(1, ranks))]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    began = time.perf_counter()
    processes = []
    for rank, note in enumerate(notes):
        command = [
            sys.executable,
            "-c",
            COUNTED,
            str(note),
            "quantize",
            str(model),
            "--out",
            str(out),
            *words,
        ]
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        if ranks:
            environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        processes.append(subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"the run with {ranks} ranks failed")
    return {
        "wall_seconds": round(time.perf_counter() - began, 2),
        "ranks": [json.loads(note.read_text(encoding="utf-8")) for note in notes],
    }


COUNTED = """
import json, sys, time
from gptq_cli.cli.app import main
from gptq_cli.engine import block, loop, run
from gptq_cli.ranks import group
spent = {}
def timed(module, name, phase):
    real = getattr(module, name)
    def counted(*words, **options):
        began = time.process_time()
        try:
            return real(*words, **options)
        finally:
            spent[phase] = spent.get(phase, 0.0) + time.process_time() - began
    setattr(module, name, counted)
def drained(real):
    return lambda *words, **options: iter(list(real(*words, **options)))
timed(loop, "open_block", "open")
block._solve = drained(block._solve)
timed(block, "_collect", "collect")
timed(block, "_solve", "solve")
timed(group, "until_done", "waiting")
timed(run, "capture", "capture")
found = {}
real = run.quantize_blocks
def counted(blocks, states, config, options, *others):
    traffic = options.team.traffic
    began, before = time.process_time(), (traffic.sum_bytes, traffic.code_bytes, traffic.other_bytes)
    reports = real(blocks, states, config, options, *others)
    after = traffic.sum_bytes, traffic.code_bytes, traffic.other_bytes
    sent = [now - then for now, then in zip(after, before)]
    found["blocks"] = time.process_time() - began
    found["bytes_per_block"] = dict(zip(("sum", "code", "other"), (n // len(blocks) for n in sent)))
    found["waited_wall_seconds"] = round(traffic.waited_seconds, 3)
    return reports
run.quantize_blocks = counted
code = main(sys.argv[2:])
found["processor_seconds"] = {k: round(v, 3) for k, v in (spent | {"blocks": found.pop("blocks")}).items()}
open(sys.argv[1], "w").write(json.dumps(found))
sys.exit(code)
"""
"""The command line with its phases timed and its traffic counted. `waiting` is part of the others."""


def ratios(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Processor time of each phase, of the busiest rank, over that of one process without a launcher."""
    plain = found["plain"]["ranks"][0]["processor_seconds"]
    return {
        name: {
            phase: round(
                max(rank["processor_seconds"].get(phase, 0.0) for rank in found[name]["ranks"]) / seconds, 2
            )
            for phase, seconds in plain.items()
            if seconds
        }
        for name in RUNS
        if name != "plain"
    }


def formula(model: Path, work: Work) -> list[dict[str, int]]:
    """What `planning.traffic` says of a block, for each of two ranks."""
    ref = ModelRef(model=str(model))
    facts = model_facts(open_skeleton(find_model(ref), ref))
    work = replace(work.on(facts), ranks=2)
    entry = PlacementEntry("", CPU, facts.size_bytes, parameters=True)
    schedule = make_schedule(Placement((entry,), CPU, "measured"), facts, work, WAYS[0])
    first, *_ = block_traffic(facts, work, schedule).values()
    return [{"sum_bytes": rank.sum_bytes, "code_bytes": rank.code_bytes} for rank in first]


if __name__ == "__main__":
    main()
