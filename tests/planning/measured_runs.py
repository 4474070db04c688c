"""Quantizes small models on the CPU and prints what each run took of main memory beside its prediction.

`python -m tests.planning.measured_runs FOLDER CASE…` in a process of its own, because the resident set of one
that has run other tests says little. A first run that is not measured loads whatever is loaded once, so the
rise of a later one is its own. Each case is made of one part of the budget above all: what a micro-batch
holds on its way, the solve, the goal "dense". The last line of stdout is JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.devices.host_memory import limit_malloc_arenas, resident_bytes
from gptq_cli.events import Event, PhaseStarted
from gptq_cli.jobs import quantize
from gptq_cli.planning.memory import CPU_BASELINE_BYTES
from tests.e2e.commands import write_text
from tests.tiny import randomize, save_tokenizer

FAST: dict[str, Any] = {"sweeps": 0, "refit": False, "scale_search": "minmax", "solve_for": "own"}
WEIGHED: dict[str, Any] = FAST | {"solve_for": "dense", "fisher_tokens": 1 << 20}


@dataclass(frozen=True)
class Case:
    """A model of one Llama block in bfloat16, and the work on it."""

    hidden: int
    inner: int
    heads: int
    """Of 64 columns each, for queries as for keys and values."""
    samples: int
    seq_len: int
    recipe: dict[str, Any]


CASES = {
    "flight": Case(1024, 256, 4, samples=8, seq_len=1024, recipe=FAST | {"true_sequential": False}),
    "solve": Case(1024, 3072, 4, samples=2, seq_len=64, recipe=FAST),
    "dense": Case(1024, 3072, 4, samples=4, seq_len=64, recipe=FAST | {"solve_for": "dense"}),
    "back": Case(1024, 2048, 4, samples=8, seq_len=1024, recipe=WEIGHED),
    "parts": Case(1024, 4096, 4, samples=2, seq_len=64, recipe=WEIGHED),
}
WARM = Case(1024, 256, 4, samples=2, seq_len=64, recipe=FAST | {"solve_for": "dense"})


@dataclass(frozen=True)
class Measured:
    """Bytes beside the interpreter and its libraries."""

    predicted_bytes: int
    measured_bytes: int


def save_model(case: Case, path: Path) -> None:
    """Write the case's model, with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=case.hidden,
        intermediate_size=case.inner,
        head_dim=64,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        num_hidden_layers=1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0)
    model.to(torch.bfloat16).save_pretrained(path)
    save_tokenizer(path)


def measure(case: Case, model: Path, text: Path, out: Path) -> Measured:
    """Quantize, and compare the rise of the resident set since the weights began to load with the plan."""
    before: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.phase in ("gradients", "load"):
            before.append(resident_bytes())

    report = quantize(
        QuantizeJob(
            model=ModelRef(model=str(model)),
            out=str(out),
            quantize=QuantizeConfig(group_size=128, **case.recipe),
            calibration=CalibrationConfig.of(
                str(text), samples=case.samples, seq_len=case.seq_len, batch_size=case.samples
            ),
        ),
        note,
    )
    predicted = dict(report.predicted_peak_bytes)["cpu"] - CPU_BASELINE_BYTES
    return Measured(predicted, dict(report.measured_peak_bytes)["cpu"] - before[0])


def main(folder: Path, names: list[str]) -> None:
    """Run the named cases, each on a model that was written before the first run."""
    limit_malloc_arenas()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    text = write_text(folder / "text.txt", 9000)
    save_model(WARM, folder / "warm")
    for name in names:
        save_model(CASES[name], folder / name)
    measure(WARM, folder / "warm", text, folder / "warm-q")
    runs = {name: measure(CASES[name], folder / name, text, folder / f"{name}-q") for name in names}
    print(json.dumps({name: asdict(run) for name, run in runs.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
