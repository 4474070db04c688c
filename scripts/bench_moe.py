#!/usr/bin/env python3
"""What quantizing the experts of a mixture-of-experts model costs: distance to the dense model, part by part.

The model is a Qwen3-MoE of 4 blocks and 128 columns with 16 experts each, of which a token is routed to 2.
This script trains it for some minutes on the standard library's English, so its routing is real: some experts
see many tokens of a calibration text, some few, and with little text some see none.

For each amount of calibration text, rows are round-to-nearest and GPTQ in three recipes, columns

    KL all         mean over tokens of KL(dense ‖ quantized), nats: attention and experts quantized
    KL experts     the experts quantized, the attention that of the dense model
    KL attention   the attention quantized, the experts that of the dense model
    tokens         of all experts, the fewest that one was calibrated on, the median, and how many saw none
    cpu s          processor seconds of the whole run, model loading included

    python scripts/bench_moe.py                        4 bits, group 128, from 64 x 512 down to 1 x 64 tokens
    python scripts/bench_moe.py --bits 3 --text 64x512 one of them
    python scripts/bench_moe.py --train-only           only make the model

Prints one Markdown table for each amount of text; the last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_quality import PLAIN, ROOT, train

from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob

STEPS, BATCH = 1500, 4
RECIPES: dict[str, dict[str, Any] | None] = {
    "round to nearest": None,
    "plain GPTQ": PLAIN,
    "recipe fast": {},
    "recipe balanced": {},
    "recipe best": {},
}
PARTS = ("all", "experts", "attention")


def mixture(vocab_size: int) -> Any:
    """A Qwen3-MoE of 4 blocks and 128 columns, with random weights; its router learns to use all experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=256, moe_intermediate_size=128,
        num_experts=16, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1,
        output_router_logits=True, router_aux_loss_coef=0.01, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def expert_modules(dense: Any) -> tuple[str, ...]:
    """The modules of the dense model whose parameters are the weights of several experts."""
    return tuple(
        name
        for name, module in dense.named_modules()
        if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    )


def attention_modules(dense: Any) -> tuple[str, ...]:
    """The modules beside the experts whose linears are quantized."""
    return tuple(name for name, _ in dense.named_modules() if name.endswith(".self_attn"))


def with_dense(model: Any, dense: Any, names: tuple[str, ...]) -> Any:
    """`model` with the modules of these names taken from the dense model."""
    mixed = copy.copy(model)
    mixed._modules = dict(model._modules)
    for name in names:
        parent = mixed
        *above, leaf = name.split(".")
        for part in above:  # the modules on the way are copied, what is beside them is shared
            child = copy.copy(parent._modules[part])
            child._modules = dict(child._modules)
            parent._modules[part] = child
            parent = child
        parent._modules[leaf] = dense.get_submodule(name)
    return mixed


def nearest(dense: Any, bits: int, group_size: int) -> Any:
    """A copy of the dense model, rounded to nearest with min/max scales by the product's own maths."""
    import torch

    from gptq_cli.gptq.solver import quantize_linears

    model = copy.deepcopy(dense)
    config = QuantizeConfig(bits=bits, group_size=group_size, act_order="none", scale_search="minmax")

    def rounded(W: Any) -> Any:  # (N, K)
        no_hessian = torch.zeros(W.shape[1], W.shape[1])
        return quantize_linears([W.float()], no_hessian, config)[0].dequantize(W.dtype)

    with torch.no_grad():
        for name in attention_modules(dense):
            for linear in model.get_submodule(name).children():
                if isinstance(linear, torch.nn.Linear):
                    linear.weight.copy_(rounded(linear.weight))
        for name in expert_modules(dense):  # (E, N, K)
            for parameter in model.get_submodule(name).parameters(recurse=False):
                for expert in parameter:
                    expert.copy_(rounded(expert))
    return model


class Evaluator:
    """The three distances of a quantized model from the dense one, on held-out windows."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        from gptq_cli.calibration import evaluation_windows, open_tokenizer

        self.dense = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        self.dense.config.output_router_logits = False
        self.experts, self.attention = expert_modules(self.dense), attention_modules(self.dense)
        tokenizer = open_tokenizer(model)
        self.windows = evaluation_windows(
            tokenizer, "pydoc-heldout", options.seq_len, options.windows
        ).input_ids

    def __call__(self, quantized: Any) -> dict[str, float]:
        from gptq_cli.evaluation.divergence import compare

        quantized.config.output_router_logits = False
        whole = compare(quantized, self.dense, self.windows)
        experts = compare(with_dense(quantized, self.dense, self.attention), self.dense, self.windows)
        attention = compare(with_dense(quantized, self.dense, self.experts), self.dense, self.windows)
        return {
            "kl_all": whole.kl,
            "kl_experts": experts.kl,
            "kl_attention": attention.kl,
            "ppl": whole.perplexity,
            "dense_ppl": whole.dense_perplexity,
        }


def expert_tokens(report: Any, experts: tuple[str, ...]) -> list[int]:
    """Calibration tokens of each linear of an expert."""
    inside = tuple(f"{name}." for name in experts)
    return [linear.tokens for linear in report.linears if linear.name.startswith(inside)]


def rows_of(
    model: Path, text: tuple[int, int], evaluator: Evaluator, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row for each way to quantize."""
    import gptq_cli
    from gptq_cli import jobs

    for row, changed in RECIPES.items():
        if changed is None:
            rounded = nearest(evaluator.dense, options.bits, options.group_size)
            yield {"row": row, "cpu_seconds": 0.0, "tokens": [], **evaluator(rounded)}
            continue
        fields = {"bits": options.bits, "group_size": options.group_size, **changed}
        config = (
            QuantizeConfig.of(row.removeprefix("recipe "), **fields)
            if row.startswith("recipe ")
            else QuantizeConfig(**fields)
        )
        with tempfile.TemporaryDirectory(prefix="gptq-moe-") as folder:
            job = QuantizeJob(
                model=ModelRef(model=str(model)),
                out=f"{folder}/out",
                quantize=config,
                calibration=CalibrationConfig(samples=text[0], seq_len=text[1]),
            )
            started = time.process_time()
            report = jobs.quantize(job)
            seconds = time.process_time() - started
            tokens = expert_tokens(report, evaluator.experts)
            if not tokens:
                raise SystemExit("bench_moe: this version leaves the experts dense: there is nothing to show")
            measured = evaluator(gptq_cli.load(job.out))
        yield {
            "row": row,
            "cpu_seconds": seconds,
            "tokens": tokens,
            "fallbacks": report.fallbacks,
            **measured,
        }


def table(text: tuple[int, int], rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown."""
    lines = [
        f"### {options.bits} bits, group {options.group_size}, {text[0]} x {text[1]} tokens",
        "",
        f"evaluated on {options.windows} x {options.seq_len} tokens; dense perplexity "
        f"{rows[0]['dense_ppl']:.3f}",
        "",
        "| | KL all | KL experts | KL attention | ppl | tokens: fewest, median, none | cpu s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seen = row["tokens"]
        counts = f"{min(seen)}, {statistics.median(seen):.0f}, {seen.count(0)}" if seen else ""
        distances = " | ".join(f"{row[f'kl_{part}']:.4f}" for part in PARTS)
        lines.append(
            f"| {row['row']} | {distances} | {row['ppl']:.3f} | {counts} | {row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "tiny-moe", help="made where it is not")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, where the model is made")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument(
        "--text", nargs="+", default=["64x512", "4x128", "1x64"], help="calibration samples x tokens"
    )
    parser.add_argument("--seq-len", type=int, default=512, help="of the windows to evaluate on")
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")
    model = train(options.model, mixture, options.steps, BATCH)
    if options.train_only:
        print(json.dumps({"model": str(model)}))
        return 0
    evaluator = Evaluator(model, options)
    summary: dict[str, Any] = {"bits": options.bits, "group_size": options.group_size, "texts": {}}
    for words in options.text:
        count, _, length = words.partition("x")
        text, rows = (int(count), int(length)), []
        for row in rows_of(model, text, evaluator, options):
            rows.append(row)
            print(f"  {words}: {row['row']}: KL {row['kl_all']:.4f}", file=sys.stderr, flush=True)
        print(table(text, rows, options) + "\n", flush=True)
        for row in rows:
            seen = row.pop("tokens")
            row["experts"] = (
                {"fewest": min(seen), "median": statistics.median(seen), "none": seen.count(0)}
                if seen
                else {}
            )
        summary["texts"][words] = rows
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
