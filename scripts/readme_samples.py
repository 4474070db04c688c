#!/usr/bin/env python3
"""Write the sample outputs of README.md: every block between `<!-- sample NAME: begin … -->` and its end.

    python scripts/readme_samples.py                 every sample: runs the demo (minutes on a quiet machine)
    python scripts/readme_samples.py map memory      only these
    python scripts/readme_samples.py --from demo     where the demo has run already: reads, does not quantize

`map` and `memory` are decided before a weight is read, from an 8B model with hollow weight files, and are the
same everywhere: `make golden` writes them and tests/test_readme.py compares them whole. The others hold times
and sizes that vary; the test compares their rows with those of a run on a tiny model (`structure`).

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

README = ROOT / "README.md"
DIR = "demo/SmolLM2-135M-Instruct-w4g64"
LLAMA = "Llama-3.1-8B"
WIDTH = 80
"""Columns of a sample."""
PARTS = ("cuda:0 ", "verdict:")
"""Paragraphs of a map that the sample keeps, by how they begin."""
MACHINES = ("cuda:0=24GiB,cpu=64GiB", "cuda:0=80GiB,cpu=64GiB", "cpu=64GiB")
TIMED = (("fast", 512), ("balanced", 512), ("balanced", 2048))
"""Recipe and tokens of a window of the time estimates."""
PROBES = 3
"""Estimates per row; the shortest is shown, because whatever disturbs a probe makes it longer."""


def replaced(text: str, name: str, block: str) -> str:
    """`text` with the lines between the markers of `name` set to `block`."""
    pattern = re.compile(
        rf"(<!-- sample {name}: begin[^\n]*-->\n).*?(<!-- sample {name}: end -->)", re.DOTALL
    )
    if not pattern.search(text):
        raise SystemExit(f"README.md has no markers for the sample {name!r}")
    return pattern.sub(lambda found: f"{found[1]}{block}\n{found[2]}", text)


def sample_of(text: str, name: str) -> str:
    """The block between the markers of `name`."""
    found = re.search(
        rf"<!-- sample {name}: begin[^\n]*-->\n(.*?)<!-- sample {name}: end -->", text, re.DOTALL
    )
    if found is None:
        raise SystemExit(f"README.md has no markers for the sample {name!r}")
    return found[1].strip("\n")


def structure(text: str) -> list[str]:
    """What must not drift in a table: the first cell of every row, without module names and paths.

    Continuation lines (indented further) have no cell of their own; equal neighbours count once.
    """
    cells: list[str] = []
    for line in text.splitlines():
        if re.match(r"^ {0,2}\S", line) and not line.startswith(("```", "$")):
            cell = re.split(r"\s{2,}", line.strip())[0]
            cell = re.sub(r"^\S+ (is ready after|is loaded,).*", r"PATH \1", cell)
            cell = re.sub(r"^(?:[\w-]+\.)+[\w-]+$", "MODULE", cell)
            if cell != "…" and cells[-1:] != [cell]:
                cells.append(cell)
    return cells


def fenced(command: str, output: str) -> str:
    """A console block."""
    body = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
    return f"```console\n$ {command}\n{body}\n```"


def shortened(text: str, starts: Iterable[str]) -> str:
    """The paragraphs that begin with one of `starts`; what is left out is an ellipsis."""
    kept: list[str] = []
    for part in text.strip("\n").split("\n\n"):
        if any(part.strip().startswith(start) for start in starts):
            kept.append(part)
        elif kept[-1:] != [" …"]:
            kept.append(" …")
    return "\n\n".join(kept).replace("\n\n …\n\n", "\n …\n").replace(" …\n\n", " …\n")


def gptq_here(*words: str) -> str:
    """stdout of a command that reads no weight, run in this process."""
    from gptq_cli.cli.app import main as command

    out, err = io.StringIO(), io.StringIO()
    width = {"COLUMNS": str(WIDTH)}
    with mock.patch.dict(os.environ, width), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command([*words, "--progress", "none"])
    if code not in (0, 3):
        raise SystemExit(f"gptq {' '.join(words)}: exit {code}\n{err.getvalue()}")
    return out.getvalue()


def fabricated(folder: Path) -> Path:
    """Llama 3.1 8B with hollow weight files, in `folder`."""
    from tests.fabricated import config_8b, fabricate

    path = folder / LLAMA
    return path if path.exists() else fabricate(config_8b(), path)


def map_sample(folder: Path) -> str:
    """`gptq inspect-map` of an 8B model on one GPU of 24 GiB, shortened."""
    options = ("--devices", MACHINES[0], "--recipe", "fast")
    shown = gptq_here("inspect-map", str(fabricated(folder)), *options)
    return fenced(f"gptq inspect-map {LLAMA} {' '.join(options)}", shortened(shown, PARTS))


def memory_sample(folder: Path) -> str:
    """What the plan says that an 8B model needs: a row per machine and recipe."""
    from gptq_cli.display.format import size

    rows = ["| `--devices` | `--recipe` | needs | plan |", "|---|---|---|---|"]
    for machine in MACHINES:
        for recipe in ("fast", "balanced"):
            words = ("--devices", machine, "--recipe", recipe, "--json")
            found: dict[str, Any] = json.loads(gptq_here("inspect-map", str(fabricated(folder)), *words))
            needs = ", ".join(f"{d['device']} {size(d['needed_bytes'])}" for d in found["devices"])
            rows.append(f"| `{machine}` | {recipe} | {needs} | {found['reason']} |")
    return "\n".join(rows)


def time_sample(folder: Path) -> str:
    """`--dry-run`'s own estimate of an 8B model on the CPU of this machine."""
    import torch

    from gptq_cli.display.format import duration
    from gptq_cli.wording import number_of

    threads = number_of(torch.get_num_threads(), "thread")
    rows = [f"| `--recipe` | `--samples` x `--seq-len` | estimate, {threads} |", "|---|---|---:|"]
    for recipe, seq_len in TIMED:
        words = ("--device-map", "cpu", "--recipe", recipe, "--seq-len", str(seq_len), "--json")
        seconds = min(
            json.loads(gptq_here("quantize", str(fabricated(folder)), "--dry-run", *words))["plan"]["seconds"]
            for _ in range(PROBES)
        )
        rows.append(f"| {recipe} | 128 x {seq_len} | about {duration(seconds)} |")
    return "\n".join(rows)


def demo_samples(folder: Path) -> dict[str, str]:
    """Run `make demo`'s script, keep its output in `folder`, and take the samples out of it."""
    kept = folder / "demo.txt"
    if not kept.exists():
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts/demo.py")],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"COLUMNS": str(WIDTH)},
        )
        folder.mkdir(exist_ok=True)
        kept.write_text(done.stdout, encoding="utf-8")
    return samples_of_demo(kept.read_text(encoding="utf-8"))


def samples_of_demo(output: str) -> dict[str, str]:
    """`demo` and `quantize` out of what scripts/demo.py printed."""
    command = next(line[2:] for line in output.splitlines() if line.startswith("$ gptq quantize "))
    summary = output.split(command)[1].split("\n worst linears")[0].split("\n next:")[0]
    table = output[output.index("perplexity on ") :].split("\n\nprompt:")[0]
    return {
        "demo": f"```\n{table.strip()}\n```",
        "quantize": fenced(command.replace(" --overwrite", ""), summary),
    }


def load_sample(_: Path) -> str:
    """`gptq load` of the demo's checkpoint."""
    prompt, options = "What is the capital of France?", ["--eval", "pydoc-heldout", "--windows", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "gptq_cli", "load", DIR, "--prompt", prompt, *options, "--progress", "none"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": str(WIDTH)},
    )
    return fenced(f'gptq load {DIR} --prompt "{prompt}" {" ".join(options)}', done.stdout)


EXACT: dict[str, Callable[[Path], str]] = {"map": map_sample, "memory": memory_sample}
"""Equal on every machine."""
VARYING = ("demo", "quantize", "load", "time")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*EXACT, *VARYING, []], help="default: all")
    parser.add_argument(
        "--from", dest="kept", type=Path, help="a folder that holds demo.txt, the demo's output"
    )
    options = parser.parse_args(argv)
    names = options.names or [*EXACT, *VARYING]
    text = README.read_text(encoding="utf-8")
    folder = Path(tempfile.mkdtemp())
    try:
        blocks = {name: make(folder) for name, make in EXACT.items() if name in names}
        if {"demo", "quantize"} & set(names):
            made = demo_samples(options.kept or folder)
            blocks |= {name: block for name, block in made.items() if name in names}
        for name, make in (("load", load_sample), ("time", time_sample)):
            if name in names:
                blocks[name] = make(folder)
    finally:
        shutil.rmtree(folder)
    for name, block in blocks.items():
        text = replaced(text, name, block)
    README.write_text(text, encoding="utf-8")
    print(json.dumps({"written": sorted(blocks)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
