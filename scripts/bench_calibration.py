#!/usr/bin/env python3
"""Which calibration text is best: a model quantized on each, and measured on four kinds of text.

Every row quantizes the same model with the same recipe, on as many windows of another text:

    pydoc       English of Python's standard library
    self        what the model itself writes (`--calibration self`)
    half, half  both, mixed window by window

It is compared with the dense model on texts that no row was calibrated on:

    prose       a text file, `--prose` (docs/quality.md: the validation split of WikiText-2)
    chat        answers of the dense model to requests that `self` does not use, on the answers' tokens alone
    code        source of the standard library, of modules that `pydoc` leaves out
    languages   German, French, Spanish and Italian: scripts/other_languages.txt

KL is KL(dense ‖ quantized) in nats per token; top-1 the share of tokens for which both models predict the
same next token, which for the answers of the chat is how often a greedy reply would go on as before.

    python scripts/bench_calibration.py --prose wikitext2-valid.txt

Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fetch_demo_model import NAME, ROOT, FetchError, fetch

sys.path.insert(0, str(ROOT))

from gptq_cli.calibration.stdlib_text import held_out
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig, QuantizeJob
from gptq_cli.load_job import LoadJob

ROWS: dict[str, list[str]] = {
    "pydoc": ["pydoc"],
    "self": ["self"],
    "half, half": ["self*0.5", "pydoc*0.5"],
}
LANGUAGES = Path(__file__).with_name("other_languages.txt")
CODE_CHARACTERS = 400_000


def held_out_code(path: Path) -> Path:
    """Source files of the standard library whose docstrings `pydoc` leaves out."""
    library = Path(sysconfig.get_path("stdlib"))
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for source in sorted(library.glob("*.py")):
            if held_out(f"module {source.stem}") and size < CODE_CHARACTERS:
                size += file.write(source.read_text(encoding="utf-8", errors="replace"))
    return path


def quantized(model: Path, sources: list[str], out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize on `sources`; what the report says of the text and the time."""
    from gptq_cli import jobs

    job = QuantizeJob(
        model=ModelRef(model=str(model)),
        out=str(out),
        quantize=QuantizeConfig.of(
            options.recipe, bits=options.bits, group_size=options.group_size, solve_for=options.solve_for
        ),
        calibration=CalibrationConfig.of(
            sources, samples=options.samples, seq_len=options.seq_len, seed=options.seed
        ),
    )
    started = time.process_time()
    report = jobs.quantize(job)
    return {
        "cpu_seconds": time.process_time() - started,
        "write_seconds": dict(report.phase_seconds).get("write", 0.0),
        "texts": [asdict(share) for share in report.calibration_texts],
    }


def measured(model: Path, out: Path, text: str, options: argparse.Namespace) -> dict[str, float]:
    """KL, top-1 and both perplexities on one text."""
    from gptq_cli import jobs
    from gptq_cli.results.load import LoadReport

    job = LoadJob(
        path=str(out), against=str(model), evaluate=text, seq_len=options.seq_len, windows=options.windows
    )
    report = jobs.load(job)
    if not isinstance(report, LoadReport) or report.agreement is None:
        raise SystemExit(f"bench_calibration: {out} was not measured on {text}")
    found = report.agreement
    return {
        "kl": found.kl,
        "top1": found.top1,
        "ppl": found.perplexity,
        "dense_ppl": found.dense_perplexity,
        "tokens": found.tokens,
    }


def table(rows: dict[str, dict[str, Any]], kinds: list[str]) -> str:
    """Markdown: KL and top-1 of every row on every kind of text, and the mean of the KL's ratios to the first
    row."""
    base = next(iter(rows.values()))
    headings = " | ".join(f"{kind} KL | top-1" for kind in kinds)
    lines = [f"| calibrated on | {headings} | mean ratio | cpu s |"]
    lines.append("|---|" + "---:|" * (2 * len(kinds) + 2))
    for name, row in rows.items():
        cells = [f"{row['on'][kind]['kl']:.4f} | {row['on'][kind]['top1']:.1%}" for kind in kinds]
        ratio = sum(row["on"][kind]["kl"] / base["on"][kind]["kl"] for kind in kinds) / len(kinds)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {ratio:.2f} | {row['cpu_seconds']:.0f} |")
    dense = " | ".join(f"{base['on'][kind]['dense_ppl']:.1f} |" for kind in kinds)
    return "\n".join([*lines, f"| perplexity of the dense model | {dense} | |"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model directory (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prose", default="pydoc-heldout", help="held-out prose: a file, or a source")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--solve-for", choices=("own", "dense"), help="default: the recipe's")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", default="auto")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="gptq-calibration-") as folder:
        try:
            model = options.model or fetch(ROOT / "demo" / NAME, ROOT / "demo" / "cache")
        except FetchError as error:
            print(f"bench_calibration: {error}", file=sys.stderr)
            return 1
        texts = {
            "prose": options.prose,
            "chat": "self",
            "code": str(held_out_code(Path(folder) / "code.txt")),
            "languages": str(LANGUAGES),
        }
        for name in options.rows:
            out = Path(folder) / name.replace(", ", "-")
            rows[name] = quantized(model, ROWS[name], out, options)
            rows[name]["on"] = {kind: measured(model, out, text, options) for kind, text in texts.items()}
            kl = ", ".join(f"{kind} {one['kl']:.4f}" for kind, one in rows[name]["on"].items())
            print(f"  {name}: KL {kl}", file=sys.stderr, flush=True)
    print(table(rows, list(texts)), flush=True)
    print(json.dumps({"samples": options.samples, "seq_len": options.seq_len, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
