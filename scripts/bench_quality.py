#!/usr/bin/env python3
"""What each option of the recipes is worth: distance to the dense model, perplexity and processor seconds.

Every row quantizes the same model on the same samples and is evaluated on the same held-out text:

    KL     mean over tokens of KL(dense ‖ quantized), nats
    ppl    perplexity, and how far it is above the dense model's
    cpu s  processor seconds of the whole run, model loading included

Two models: SmolLM2-135M-Instruct (Llama kind; group sizes 64 and 32 divide it), and a GPT-NeoX of 256 columns
that this script trains for a few minutes on the standard library's English, where group 128 fits. Rows are
plain GPTQ with one option changed, or a recipe.

    python scripts/bench_quality.py                        every setting of SETTINGS; an hour on two cores
    python scripts/bench_quality.py --only smollm2-w4g64   one of them
    python scripts/bench_quality.py --text wiki.txt        first two thirds to calibrate, the rest to evaluate
    python scripts/bench_quality.py --architectures        plain GPTQ and recipes on tiny models of every kind
    python scripts/bench_quality.py --budgets              KL against size: uniform bits, and budgets of the
                                                           same sizes and between them

Prints one Markdown table per setting (docs/quality.md holds them); the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fetch_demo_model import NAME, ROOT, FetchError, fetch

sys.path.insert(0, str(ROOT))

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.recipes import RECIPES

PLAIN = {
    "act_order": "none",
    "damp_percent": 0.01,
    "scale_search": "minmax",
    "positive_scales": True,
    "sweeps": 0,
    "refit": False,
    "solve_for": "own",
}
"""The original code's choices."""
RECIPE_ROWS: dict[str, dict[str, Any]] = {
    f"recipe {name}": dict(overrides) for name, overrides in RECIPES.items()
}
SHORT: dict[str, dict[str, Any]] = {"plain GPTQ": PLAIN, **RECIPE_ROWS}
SINGLE: dict[str, dict[str, Any]] = {
    "+ damping 0.05": {**PLAIN, "damp_percent": 0.05},
    "+ static act-order": {**PLAIN, "act_order": "static"},
    "+ desc_act": {**PLAIN, "desc_act": True},
    "+ mse scales": {**PLAIN, "scale_search": "mse"},
    "+ hessian scales, positive": {**PLAIN, "scale_search": "hessian"},
    "+ hessian scales, signed": {**PLAIN, "scale_search": "hessian", "positive_scales": False},
    "+ 1 sweep": {**PLAIN, "sweeps": 1},
    "+ refit": {**PLAIN, "refit": True},
    "+ 1 sweep, refit": {**PLAIN, "sweeps": 1, "refit": True},
    "+ dense target, all": {**PLAIN, "solve_for": "dense", "dense_share": 1.0},
}
LONG: dict[str, dict[str, Any]] = {
    "plain GPTQ": PLAIN,
    **SINGLE,
    **RECIPE_ROWS,
    "recipe balanced, asymmetric": {**RECIPE_ROWS["recipe balanced"], "sym": False},
    "recipe balanced, desc_act": {**RECIPE_ROWS["recipe balanced"], "desc_act": True},
}


@dataclass(frozen=True)
class Setting:
    """A model at some bits and group size, and the rows to make."""

    model: str
    bits: int
    group_size: int
    rows: dict[str, dict[str, Any]]


SETTINGS = {
    "smollm2-w4g64": Setting("smollm2", 4, 64, LONG),
    "smollm2-w4g32": Setting("smollm2", 4, 32, SHORT),
    "smollm2-w3g64": Setting("smollm2", 3, 64, SHORT),
    "smollm2-w2g64": Setting("smollm2", 2, 64, SHORT),
    "smollm2-w8g64": Setting("smollm2", 8, 64, SHORT),
    "neox-w4g128": Setting("neox", 4, 128, LONG),
    "neox-w4g64": Setting("neox", 4, 64, SHORT),
    "neox-w4g32": Setting("neox", 4, 32, SHORT),
    "neox-w3g128": Setting("neox", 3, 128, SHORT),
    "neox-w2g128": Setting("neox", 2, 128, SHORT),
    "neox-w8g128": Setting("neox", 8, 128, SHORT),
}


def neox(vocab_size: int) -> Any:
    """A GPT-NeoX of 6 blocks and 256 columns, with random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocab_size, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=1024, rotary_pct=0.25, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def train(folder: Path, make: Callable[[int], Any], steps: int = 250, batch: int = 12) -> Path:
    """The model that `make` makes for a vocabulary, trained on the calibration half of `pydoc`; made once."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from gptq_cli.calibration.text import read_documents
    from gptq_cli.gptq.matmul import fast_matmul_supported

    if (folder / "config.json").is_file():
        return folder
    print(f"training {folder.name}: {steps} steps", file=sys.stderr, flush=True)
    text = [piece.text for piece in read_documents("pydoc").pieces]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=4096, special_tokens=["<|end|>"], show_progress=False)
    )
    ids = torch.tensor([i for encoding in tokenizer.encode_batch(text) for i in encoding.ids])
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = make(4096)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    length = 256
    for step in range(steps):
        starts = torch.randint(len(ids) - length, (batch,), generator=generator)
        window = torch.stack([ids[start : start + length] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_matmul_supported(torch.bfloat16, "cpu")):
            loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


class Evaluator:
    """Compares checkpoints of one model with it on held-out windows."""

    def __init__(self, model: Path, source: str, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        from gptq_cli.calibration import evaluation_windows, open_tokenizer

        self.dense = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        tokenizer = open_tokenizer(model)
        self.windows = evaluation_windows(tokenizer, source, options.seq_len, options.windows).input_ids

    def __call__(self, quantized: Any) -> dict[str, float]:
        from gptq_cli.evaluation.divergence import compare

        found = compare(quantized, self.dense, self.windows)
        return {"kl": found.kl, "ppl": found.perplexity, "dense_ppl": found.dense_perplexity}

    def nearest(self, setting: Setting) -> dict[str, float]:
        """Round-to-nearest with min/max scales, by the product's own maths."""
        import copy

        import torch

        from gptq_cli.gptq.solver import quantize_linears
        from gptq_cli.model.blocks import assign, find_blocks, find_linears, weight_matrix

        model = copy.deepcopy(self.dense)
        config = QuantizeConfig(
            bits=setting.bits, group_size=setting.group_size, act_order="none", scale_search="minmax"
        )
        with torch.no_grad():
            for name in find_blocks(model)[1]:
                for linear in find_linears(model.get_submodule(name)).values():
                    W = weight_matrix(linear)
                    no_hessian = torch.zeros(W.shape[1], W.shape[1])
                    (rounded,) = quantize_linears([W.float()], no_hessian, config)
                    assign(linear, rounded.dequantize(W.dtype))
        return self(model)


def bench(
    name: str, setting: Setting, model: Path, texts: tuple[str, str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All rows of one setting, but those that tune a model which cannot be tuned."""
    import gptq_cli
    from gptq_cli import jobs
    from gptq_cli.errors import PreflightRefused

    evaluator = Evaluator(model, texts[1], options)
    rows = [{"row": "round to nearest", "cpu_seconds": 0.0, **evaluator.nearest(setting)}]
    calibration = CalibrationConfig.of(texts[0], samples=options.samples, seq_len=options.seq_len)
    for row, changed in setting.rows.items():
        with tempfile.TemporaryDirectory(prefix="gptq-quality-") as folder:
            job = QuantizeJob(
                model=ModelRef(model=str(model)),
                out=f"{folder}/out",
                quantize=QuantizeConfig(bits=setting.bits, group_size=setting.group_size, **changed),
                calibration=calibration,
            )
            started = time.process_time()
            try:
                report = jobs.quantize(job)
            except PreflightRefused as refused:
                errors = {found.rule for found in refused.report.findings if found.level == "error"}
                if errors != {"tuning-possible"}:
                    raise
                print(f"  {name}: {row}: {refused}", file=sys.stderr, flush=True)
                continue
            seconds = time.process_time() - started
            if report.fallbacks:
                raise SystemExit(f"bench_quality: {name}, {row}: {report.fallbacks} fallbacks")
            rows.append({"row": row, "cpu_seconds": seconds, **evaluator(gptq_cli.load(job.out))})
        print(f"  {name}: {row}: KL {rows[-1]['kl']:.4f}", file=sys.stderr, flush=True)
    return rows


def bench_architectures(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """KL of plain GPTQ and of the recipes on the tests' tiny random models, 4 bits, group 32."""
    from tests.tiny import TINY, save_tiny

    made: dict[str, dict[str, float]] = {}
    print("| | plain GPTQ | " + " | ".join(name.removeprefix("recipe ") for name in RECIPE_ROWS) + " |")
    print("|---|" + "---:|" * (1 + len(RECIPE_ROWS)))
    for name in TINY:
        model = folder / name
        save_tiny(name, model)
        rows = bench(name, Setting(name, 4, 32, SHORT), model, ("pydoc", "pydoc-heldout"), options)
        made[name] = {row["row"]: row["kl"] for row in rows}
        plain = made[name]["plain GPTQ"]
        ratios = " | ".join(
            f"{made[name][row] / plain:.2f}" if row in made[name] else "refused" for row in RECIPE_ROWS
        )
        print(f"| {name} | {plain:.3g} | {ratios} |", flush=True)
    return made


def bench_budgets(
    model: Path, texts: tuple[str, str], options: argparse.Namespace, group_size: int = 64
) -> list[dict[str, Any]]:
    """Uniform bits, then budgets of the sizes that they came to and of those between them."""
    import gptq_cli
    from gptq_cli import jobs

    evaluator = Evaluator(model, texts[1], options)
    calibration = CalibrationConfig.of(texts[0], samples=options.samples, seq_len=options.seq_len)
    rows: list[dict[str, Any]] = []

    def made(**fields: Any) -> float:
        with tempfile.TemporaryDirectory(prefix="gptq-quality-") as folder:
            job = QuantizeJob(
                model=ModelRef(model=str(model)),
                out=f"{folder}/out",
                quantize=QuantizeConfig.of(
                    options.recipe, group_size=group_size, solve_for=options.solve_for, **fields
                ),
                calibration=calibration,
            )
            started = time.process_time()
            report = jobs.quantize(job)
            seconds, choice = time.process_time() - started, report.bit_choice
            row = {
                "row": f"{report.bits} bits" if choice is None else f"budget {choice.asked:.3f}",
                "bits_per_parameter": report.bits_per_parameter,
                "predicted_kl": None if choice is None else choice.kl,
                "linears": {str(one.bits): 0 for one in choice.fused} if choice is not None else {},
                "cpu_seconds": seconds,
                **evaluator(gptq_cli.load(job.out)),
            }
            for one in choice.fused if choice is not None else ():
                row["linears"][str(one.bits)] += 1
        rows.append(row)
        print(f"  {row['row']}: KL {row['kl']:.4f}", file=sys.stderr, flush=True)
        return report.bits_per_parameter

    widths = [made(bits=bits) for bits in options.bits]
    between = [(small + large) / 2 for small, large in pairwise(widths)]
    for bits in sorted([*widths, *between]):
        made(bits_per_weight=bits)
    return rows


def budget_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, by size."""
    lines = ["| | bits per parameter | KL | predicted | perplexity | sets of linears by bits |"]
    lines.append("|---|---:|---:|---:|---:|---|")
    for row in sorted(rows, key=lambda one: (one["bits_per_parameter"], one["row"])):
        predicted = "" if row["predicted_kl"] is None else f"{row['predicted_kl']:.3f}"
        held = ", ".join(f"{count} at {bits}" for bits, count in sorted(row["linears"].items()))
        lines.append(
            f"| {row['row']} | {row['bits_per_parameter']:.4f} | {row['kl']:.4f} | {predicted} "
            f"| {row['ppl']:.2f} | {held} |"
        )
    return "\n".join(lines)


def table(name: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown."""
    dense = rows[0]["dense_ppl"]
    base = next(row["kl"] for row in rows if row["row"] == "plain GPTQ")
    lines = [
        f"### {name}",
        "",
        f"{options.samples} x {options.seq_len} tokens; evaluated on {options.windows} x {options.seq_len};"
        f" dense perplexity {dense:.3f}",
        "",
        "| | KL | of plain | ppl | gap | cpu s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['row']} | {row['kl']:.3g} | {row['kl'] / base:.2f} | {row['ppl']:.3f}"
        f" | {row['ppl'] / dense - 1:+.1%} | {row['cpu_seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def split(text: Path | None, folder: Path) -> tuple[str, str]:
    """(source to calibrate on, source to evaluate on); they share no text."""
    if text is None:
        return "pydoc", "pydoc-heldout"
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = 2 * len(lines) // 3
    for name, part in (("calibration.txt", lines[:cut]), ("held-out.txt", lines[cut:])):
        (folder / name).write_text("".join(part), encoding="utf-8")
    return str(folder / "calibration.txt"), str(folder / "held-out.txt")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=sorted(SETTINGS), help="may be repeated")
    parser.add_argument("--architectures", action="store_true", help="tiny models of every kind instead")
    parser.add_argument(
        "--budgets", action="store_true", help="--bits-per-weight beside uniform bits instead"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8], help="of --budgets")
    parser.add_argument("--model", type=Path, help="of --budgets (default: SmolLM2)")
    parser.add_argument("--recipe", default="balanced", help="of --budgets")
    parser.add_argument("--solve-for", choices=("own", "dense"), help="of --budgets; default: the recipe's")
    parser.add_argument("--text", type=Path, help="for SmolLM2: a text file (default: pydoc, pydoc-heldout)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rows", nargs="+", help="only rows whose name contains one of these words")
    options = parser.parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")
    summary: dict[str, Any] = {"samples": options.samples, "seq_len": options.seq_len, "settings": {}}
    with tempfile.TemporaryDirectory(prefix="gptq-quality-") as folder:
        try:
            models = {}
            if options.architectures:
                summary["architectures"] = bench_architectures(options, Path(folder))
            if options.budgets:
                model = options.model or fetch(ROOT / "demo" / NAME, ROOT / "demo" / "cache")
                rows = bench_budgets(model, split(options.text, Path(folder)), options)
                print(budget_table(rows), flush=True)
                summary["budgets"] = rows
            others = options.architectures or options.budgets
            for name in () if others else options.only or SETTINGS:
                setting = SETTINGS[name]
                if options.rows:
                    kept = {row: f for row, f in setting.rows.items() if any(w in row for w in options.rows)}
                    setting = replace(setting, rows={"plain GPTQ": PLAIN, **kept})
                if setting.model not in models:
                    models[setting.model] = (
                        train(ROOT / "demo" / "tiny-neox", neox)
                        if setting.model == "neox"
                        else fetch(ROOT / "demo" / NAME, ROOT / "demo" / "cache")
                    )
                text = options.text if setting.model == "smollm2" else None
                rows = bench(name, setting, models[setting.model], split(text, Path(folder)), options)
                print(table(name, rows, options) + "\n", flush=True)
                summary["settings"][name] = rows
        except FetchError as error:
            print(f"bench_quality: {error}", file=sys.stderr)
            return 1
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
