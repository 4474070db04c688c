#!/usr/bin/env python3
"""Every architecture of the installed Transformers, quantized as a tiny random model and read twice.

Each causal type, and each with towers (images, sound) beside its text decoder, is made from its own default
config, shrunk (`tests/architectures.py`), saved,
quantized with each recipe, verified, opened again, and compared with a second reading that knows nothing of
this package (`tests/second_opinion.py`). Columns of the table:

    share      quantized part of the two- and three-dimensional weights of decoder blocks that text reaches,
               percent; all stacks of blocks count, and a shared weight counts once
    difference largest one between the logits of both readings, relative to the largest logit
    KL         mean KL(dense ‖ quantized) in nats, and in brackets that of round-to-nearest
    default    share at the published default size (on the meta device), and what stays dense

    python scripts/architectures.py                       all types; recipes fast, balanced: half an hour
    python scripts/architectures.py qwen3_moe mamba       some of them
    python scripts/architectures.py --write               docs/architectures.md as well: these types' rows
    python scripts/architectures.py --sizes --write       the column of default sizes alone

Of default sizes, what is a thousandth of the blocks' weights or more is named, at most three. The classes of
some types have no default that can be built; of others it lacks a field (`tests/default_sizes.py` gives it).

The last line is JSON: how many types came to which end. Exit 1 when one crashed, is unreadable, or is wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers

from gptq_cli.errors import GptqError, ModelError, PreflightRefused, UsageError
from tests import architectures
from tests.default_sizes import DefaultSize, default_size
from tests.second_opinion import examine, logits, save_source

RECIPES = ("fast", "balanced")
DOCS = ROOT / "docs" / "architectures.md"


@dataclass
class Outcome:
    """One type under one recipe."""

    kind: str
    recipe: str
    status: str = ""
    """"right", "refused", "not built", or "not compared" where the second reading cannot put experts back
    into the source's tensors; else "crash", or what `Examination.problem` says."""
    note: str = ""
    share: float | None = None
    logits: float | None = None
    kl: float | None = None
    rtn_kl: float | None = None
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Neither right, nor refused, nor beyond the generator of tiny models or the second reading."""
        return self.status not in ("right", "refused", "not built", "not compared")


def main() -> int:
    arguments = _arguments()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("gptq_cli").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    kinds = arguments.kinds or [*architectures.CAUSAL, *architectures.WITH_TOWERS]
    outcomes: list[Outcome] = []
    for kind in () if arguments.sizes else kinds:
        with tempfile.TemporaryDirectory() as folder:
            for outcome in _try_kind(kind, arguments.recipe or RECIPES, Path(folder), arguments.traceback):
                outcomes.append(outcome)
                print(_line(outcome), flush=True)
        gc.collect()
    sizes: dict[str, str] = {}
    for kind in kinds if arguments.write or arguments.sizes else ():
        sizes[kind] = default_words(kind)
        print(f"{kind:28} {sizes[kind]}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    if arguments.write:
        DOCS.write_text(page(merged(rows_of(DOCS.read_text()), rows(outcomes)), sizes))
    bad = [f"{outcome.kind} {outcome.recipe}" for outcome in outcomes if outcome.bad]
    counts = Counter(outcome.status.partition(":")[0] for outcome in outcomes)
    print(json.dumps({"types": len(kinds), **counts, "bad": bad}))
    return 1 if bad else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types; all if none is given")
    parser.add_argument("--recipe", action="append", help="fast, balanced or best; repeatable")
    parser.add_argument("--sizes", action="store_true", help="look at the default sizes alone")
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md, sizes included")
    parser.add_argument("--json", help="write every outcome to this file")
    parser.add_argument("--traceback", action="store_true", help="print the traceback of what crashes")
    return parser.parse_args()


def _try_kind(kind: str, recipes: Sequence[str], folder: Path, show: bool) -> Iterator[Outcome]:
    try:
        model = architectures.build(kind)
        logits(model)
        source = save_source(model, folder)
    except Exception as error:
        yield Outcome(kind, "-", "not built", _first_line(error))
        return
    for recipe in recipes:
        outcome = Outcome(kind, recipe)
        started = time.perf_counter()
        try:
            _try(outcome, type(model), source, folder / recipe)
        except (PreflightRefused, ModelError, UsageError) as error:
            outcome.status, outcome.note = "refused", str(error).replace("\n", "; ")[:400]
        except GptqError as error:
            outcome.status, outcome.note = "crash", f"{type(error).__name__}: {error.message}"[:400]
        except AssertionError as error:  # of the second reading
            outcome.status, outcome.note = "not compared", _first_line(error)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            outcome.status = "crash"
            outcome.note = f"{_first_line(error)} ({Path(at.filename).name}:{at.lineno})"
            if show:
                traceback.print_exc()
        outcome.seconds = time.perf_counter() - started
        shutil.rmtree(folder / recipe, ignore_errors=True)
        yield outcome
        if outcome.status == "refused":
            return


def _try(outcome: Outcome, model_class: Any, source: Path, out: Path) -> None:
    found = examine(model_class, source, out, recipe=outcome.recipe)
    outcome.share, outcome.logits = 100 * found.share, found.logits
    outcome.kl, outcome.rtn_kl = found.kl, found.rtn_kl
    outcome.status = found.problem or "right"


def default_words(kind: str) -> str:
    """Parameters of the default size, the quantized share of its block weights, and what stays dense."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = default_size(kind, Path(folder))
        except Exception as error:
            return f"none: {_first_line(error).replace(folder, 'MODEL')}"
    return size_words(found)


def size_words(found: DefaultSize) -> str:
    """`30.53 B, 99.9 %; model.layers.*.mlp.gate 0.1 % (router)`."""
    words = f"{found.parameters / 1e9:.2f} B, {100 * found.share:.1f} %"
    large = [(name, why, part) for name, why, part in found.dense if part >= 0.001][:3]
    return "; ".join([words, *(f"{name} {100 * part:.1f} % ({why})" for name, why, part in large)])


def _line(outcome: Outcome) -> str:
    figures = ""
    if outcome.kl is not None:
        figures = (
            f" share {outcome.share:.1f} difference {outcome.logits:.1e}"
            f" KL {outcome.kl:.2e} ({outcome.rtn_kl:.2e})"
        )
    place = f"{outcome.kind:28} {outcome.recipe:9}"
    return f"{place} {outcome.status:10}{figures} {outcome.seconds:.1f} s {outcome.note}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:240]


Row = dict[str, str]
"""Column -> cell."""
COLUMNS = (
    *("type", "result", "share, %", "difference", *(f"KL, {recipe}" for recipe in RECIPES)),
    *("nearest", "default size"),
)


def rows(outcomes: Sequence[Outcome]) -> dict[str, Row]:
    """Type -> its row; a recipe that was not run has no cell."""
    by_kind: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_kind.setdefault(outcome.kind, []).append(outcome)
    found = {}
    for kind, results in by_kind.items():
        worst = next((outcome for outcome in results if outcome.status != "right"), results[0])
        words = worst.status if worst.status == "right" else f"{worst.status}: {worst.note}".rstrip(": ")
        kls = {
            f"KL, {outcome.recipe}": _figure(outcome.kl) for outcome in results if outcome.recipe in RECIPES
        }
        found[kind] = {
            "type": kind,
            "result": words,
            "share, %": "" if worst.share is None else f"{worst.share:.1f}",
            "difference": _figure(worst.logits),
            "nearest": _figure(worst.rtn_kl),
            **kls,
        }
    return found


def rows_of(text: str) -> dict[str, Row]:
    """The rows of a page that was written before."""
    cells = (line.strip("|").split("|") for line in text.splitlines() if line.startswith("| "))
    whole = [[cell.strip() for cell in row] for row in cells if len(row) == len(COLUMNS)]
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in whole if row[0] != "type"}


def merged(before: dict[str, Row], now: dict[str, Row]) -> dict[str, Row]:
    """The rows of both; cells that were not filled now stay."""
    return before | {kind: before.get(kind, {}) | row for kind, row in now.items()}


def page(found: dict[str, Row], sizes: dict[str, str]) -> str:
    """docs/architectures.md: `found`, with the default `sizes` that were looked at now."""
    order = [*architectures.CAUSAL, *architectures.WITH_TOWERS]
    kinds = sorted(found, key=lambda kind: order.index(kind) if kind in order else len(order))
    counts = Counter(found[kind]["result"].partition(":")[0] for kind in kinds)
    totals = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    lines = [
        "# Architectures",
        "",
        "Every causal type, and every type with towers beside its text decoder, of Transformers",
        f"{transformers.__version__} as a tiny random model: quantized, verified, loaded, and compared with",
        f"a second reading. {len(kinds)} types: {totals}.",
        "Made by `python scripts/architectures.py --write`, whose docstring explains the columns.",
        "",
        "Rows without a figure under a recipe were run with the other alone. *Not built*: the generator of",
        "tiny models or a package that is missing here (PIL, scipy), encoder-decoders for the most part.",
        "*None* under default size: the class has no default that can be built, or it is no decoder.",
        "",
        *("| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)),
    ]
    for kind in kinds:
        row = found[kind] | ({"default size": sizes[kind]} if kind in sizes else {})
        cells = [row.get(column, "").replace("|", "/") for column in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


if __name__ == "__main__":
    sys.exit(main())
