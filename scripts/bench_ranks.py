#!/usr/bin/env python3
"""What one process and two that work together take, phase by phase, and the bytes that travel.

    python scripts/bench_ranks.py [--hidden 256] [--layers 2] [--samples 64] [--seq-len 256]

A Llama with random weights is quantized in this process alone, as a rank of one (`leaves`: sums in a tree),
and by two processes over gloo on the CPU, each with half of the cores. On one machine no speed-up is to be
expected: what is measured is the overhead. The last line is JSON.
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
        config = QuantizeConfig(group_size=64)
        calibration = CalibrationConfig(samples=asked.samples, seq_len=asked.seq_len)
        found["formula"] = formula(model, Work(config, calibration))
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
    """One run; `ranks` 0: without a launcher. Phase times from report.json, traffic from rank 0."""
    out, notes = folder / f"out-{ranks}", folder / f"traffic-{ranks}"
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    command = [sys.executable, "-c", COUNTED, str(notes), "quantize", str(model), "--out", str(out), *words]
    threads = max(1, (os.cpu_count() or 1) // max(1, ranks))
    began = time.perf_counter()
    processes = []
    for rank in range(max(1, ranks)):
        environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
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
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "seconds": round(time.perf_counter() - began, 2),
        "phases": {name: round(seconds, 3) for name, seconds in report["phase_seconds"].items()},
    }
    if notes.exists():
        sent, waited = json.loads(notes.read_text(encoding="utf-8"))
        blocks = len(report["blocks"])
        found |= {"bytes_per_block": int(sent / blocks), "waited_seconds": round(waited, 3)}
    return found


COUNTED = """
import json, os, sys
from gptq_cli.cli.app import main
from gptq_cli.engine import run
from gptq_cli.ranks.group import Ranks
real = run.quantize_blocks
def counted(blocks, states, config, options, *others):
    team = options.team
    if not isinstance(team, Ranks):
        return real(blocks, states, config, options, *others)
    before = team.traffic.sent_bytes, team.traffic.waited_seconds
    found = real(blocks, states, config, options, *others)
    if team.rank == 0:
        sent = team.traffic.sent_bytes - before[0], team.traffic.waited_seconds - before[1]
        open(sys.argv[1], "w").write(json.dumps(sent))
    return found
run.quantize_blocks = counted
sys.exit(main(sys.argv[2:]))
"""
"""The command line with the traffic of the block loop noted."""


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
