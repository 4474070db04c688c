#!/usr/bin/env python3
"""The main job, done by `gptq quantize` and by its peers: time, memory and accuracy side by side, as ratios.

Every run gets the same model, calibration token ids, bits and group size, and is a process of its own; one
runs after the other. The checkpoints are then evaluated by one reader on text that no run has seen:

    KL     mean over tokens of KL(dense ‖ quantized), nats
    gap    perplexity of the quantized model over the dense one's, minus 1

On a CPU without fast bf16 the peers get the model in float32, or they would take ten times as long.
A peer is installed into a virtual environment of its own (`.venv-peer-NAME`, on its first run; minutes and
some gigabytes) and uses its own defaults beyond what `PEERS` lists. What cannot be installed or does not run
here is left out, with the reason. Ratios are to the first run.

    python scripts/bench_peers.py                     the demo model, 128 x 512 tokens, 4 bits, group 64
    python scripts/bench_peers.py --text wiki.txt     calibrate on its first two thirds, evaluate on the rest
                                                      and on `pydoc-heldout`: two kinds of text
    python scripts/bench_peers.py --peers gptqmodel,auto-round-50 --repeats 3
    python scripts/bench_peers.py --peers all --as-stored     every peer, in the model's own dtype as well
    python scripts/bench_peers.py --recipes "fast,best,best --dense-share 0.5"
    python scripts/bench_peers.py --model demo/Gemma3-270M --group-size 128     see fetch_second_model.py
    python scripts/bench_peers.py --blocks 8 --peers "" --recipes "best --fisher-tokens 0,best"
                                                      of the first 8 blocks alone, the norm and the head

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


@dataclass(frozen=True)
class Peer:
    """One way to run another tool."""

    client: str
    """The function of `CLIENTS`, and the environment that it runs in."""
    options: dict[str, Any]
    """Beyond its defaults."""


PEERS = {
    "gptqmodel": Peer("gptqmodel", {}),
    "gptqmodel-norm": Peer("gptqmodel-norm", {"steps": 400}),
    "auto-round-0": Peer("auto-round", {"iters": 0}),
    "auto-round-0-neuqi": Peer("auto-round", {"iters": 0, "enable_neuqi": True}),
    "auto-round-50": Peer("auto-round", {"iters": 50}),
    "auto-round-200": Peer("auto-round", {"iters": 200}),
    "llm-compressor": Peer("llm-compressor", {}),
}
# torch first and pinned: pip would take the newest, with its CUDA packages
ENVIRONMENTS = {
    "gptqmodel": ("torch==2.13.0", "transformers==5.23.0", "optimum==2.3.0", "gptqmodel==7.6.0"),
    "gptqmodel-norm": ("torch==2.14.1", "transformers==5.23.0", "optimum==2.3.0", "gptqmodel==7.7.0"),
    "auto-round": ("torch==2.13.0", "transformers==5.23.0", "auto-round==0.16.1"),
    "llm-compressor": ("torch==2.13.0", "llmcompressor==0.14.0.1"),
}
SETTINGS = {
    "GPTQMODEL_CPU_WORKERS": "2",  # with fewer cores than workers GPTQModel raises
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
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


class UnavailableError(Exception):
    """A peer that cannot be installed, or does not run here; the message says why."""


def measured(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Cost:
    """Run to the end in a process of its own. Raises `UnavailableError`, with the end of its log."""
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
        raise UnavailableError(f"exit {process.returncode} of {' '.join(command)}\n{end}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * MAXRSS_UNIT)


def environment_of(name: str) -> Path:
    """The interpreter of a virtual environment, installed unless it is. Raises `UnavailableError`."""
    folder = ROOT / f".venv-peer-{name}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    torch, *packages = ENVIRONMENTS[name]
    wanted = "\n".join((torch, *packages))
    if not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"installing {packages[-1]} into {folder.name} (minutes, once)", flush=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        pip += ["--progress-bar", "off"]
        for requirements in ([torch], [torch, *packages]):
            done = subprocess.run([*pip, *requirements], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                said = done.stderr.strip().splitlines()[-3:]
                raise UnavailableError(f"pip could not install {' '.join(requirements)}: {' '.join(said)}")
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


def with_norm_tuning(job: dict[str, Any]) -> None:
    """The same, then its tuning of the norms' gains on the dense model's logits, as its README says."""
    import torch
    from gptqmodel import BACKEND, GPTQModel, NormConfig

    with_gptqmodel(job | {"out": f"{job['out']}-untuned"})
    # its packed linears run in 16 bits alone
    model = GPTQModel.load(f"{job['out']}-untuned", backend=BACKEND.TORCH, dtype=torch.bfloat16)
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["ids"]]
    model.requantize(calibration=calibration, norm=NormConfig(teacher=job["model"], **job["options"]))
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
        model, tokenizer, bits=job["bits"], group_size=job["group_size"], sym=True, **job["options"],
        dataset=samples, nsamples=ids.shape[0], seqlen=ids.shape[1], device_map="cpu",
    )  # fmt: skip
    rounding.quantize_and_save(job["out"], format="auto_gptq")
    for config in list(Path(job["out"]).glob("*/config.json")):  # it writes into a folder of its own in there
        for path in list(config.parent.iterdir()):
            path.rename(Path(job["out"]) / path.name)


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


CLIENTS = {
    "gptqmodel": with_gptqmodel,
    "gptqmodel-norm": with_norm_tuning,
    "auto-round": with_auto_round,
    "llm-compressor": with_llm_compressor,
}


# -- evaluating


def evaluate(job: dict[str, Any], checkpoint: Path, *, transformers: bool) -> dict[str, Quality]:
    """Compare a checkpoint with the dense model on every text; `transformers`: opened by Transformers, not by
    us."""
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
    qualities = {}
    for text, windows in job["windows"].items():
        found = compare(quantized, dense, torch.tensor(windows))
        qualities[text] = Quality(found.kl, found.top1, found.perplexity, found.dense_perplexity)
    return qualities


def peer_dtype() -> str:
    """bfloat16, as the model is stored; float32 where this CPU would multiply bf16 matrices many times slower
    and a peer would spend hours at it. `gptq` is given no such choice: it finds out by itself.
    """
    import torch

    from gptq_cli.gptq.matmul import fast_matmul_supported

    return "bfloat16" if fast_matmul_supported(torch.bfloat16, "cpu") else "float32"


def texts(options: argparse.Namespace, folder: Path) -> tuple[str, dict[str, str]]:
    """The calibration source, and by name the sources to evaluate on; no text is in two of them."""
    if options.text is None:
        return "pydoc", {"pydoc": "pydoc-heldout"}
    lines = options.text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = 2 * len(lines) // 3
    for name, part in (("calibration.txt", lines[:cut]), ("held-out.txt", lines[cut:])):
        (folder / name).write_text("".join(part), encoding="utf-8")
    held_out = {options.text.stem: str(folder / "held-out.txt"), "pydoc": "pydoc-heldout"}
    return str(folder / "calibration.txt"), held_out


def token_ids(
    options: argparse.Namespace, model: Path, calibration: str, held_out: dict[str, str]
) -> dict[str, Any]:
    """What every run gets: exactly the windows that `gptq quantize` cuts itself, and those to evaluate on."""
    from gptq_cli.calibration import evaluation_windows, make_batches, open_tokenizer
    from gptq_cli.config import CalibrationConfig

    tokenizer = open_tokenizer(model)
    wanted = CalibrationConfig.of(sources=calibration, samples=options.samples, seq_len=options.seq_len)
    length, count = options.eval_seq_len, options.windows
    return {
        "ids": make_batches(tokenizer, wanted).input_ids.tolist(),
        "windows": {
            name: evaluation_windows(tokenizer, source, length, count).input_ids.tolist()
            for name, source in held_out.items()
        },
    }


def first_blocks(model: Path, count: int, folder: Path) -> Path:
    """The model with its first `count` blocks, written into `folder`; its norm and its head stay."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    if not 1 <= count <= config.num_hidden_layers:
        raise SystemExit(f"bench_peers: --blocks {count}: allowed are 1 to {config.num_hidden_layers}")
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    out = folder / f"{model.name}-{count}-blocks"
    AutoModelForCausalLM.from_pretrained(model, config=config, dtype="auto").save_pretrained(out)
    for path in (*model.glob("tokenizer*"), *model.glob("chat_template*")):
        shutil.copy(path, out)
    return out


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    name: str
    command: list[str]
    """OUT and JOB are filled in when it starts."""
    peer: Peer | None = None
    dtype: str | None = None
    """Of the peer's model."""


def runs(options: argparse.Namespace, job: dict[str, Any], calibration: str) -> list[Run]:
    """Every run whose tool is there; the others are named with the reason."""
    found = []
    best, stored = peer_dtype(), stored_dtype(Path(job["model"]))
    dtypes = [best, *([stored] if options.as_stored and stored != best else [])]
    for name in options.peers:
        try:
            python = str(environment_of(PEERS[name].client))
        except UnavailableError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        command = [python, str(Path(__file__).resolve()), "--client", name, "JOB", "OUT"]
        for dtype in dtypes:
            label = name if dtype == best else f"{name} {dtype}"
            found.append(Run(label, [*command, dtype], PEERS[name], dtype))
    for recipe in options.recipes:
        command = [
            sys.executable, "-m", "gptq_cli", "quantize", job["model"], "--recipe", *recipe.split(),
            "--bits", str(options.bits), "--group-size", str(options.group_size),
            "--calibration", calibration,
            "--samples", str(options.samples), "--seq-len", str(options.seq_len),
            *(["--desc-act"] if options.desc_act else []),
            "--out", "OUT", "--overwrite", "--json", "--progress", "none",
        ]  # fmt: skip
        found.append(Run(f"gptq {recipe}", command))
    return found


def stored_dtype(model: Path) -> str:
    """The dtype that config.json names: what a user who sets nothing gets."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def evaluated_apart(run: Run, request: Path, out: Path) -> dict[str, Quality]:
    """Evaluate in a process of its own: a peer that writes another format is read in its own environment."""
    own_format = run.peer is not None and run.peer.client == "llm-compressor"
    python = str(environment_of("llm-compressor")) if own_format else sys.executable
    command = [python, str(Path(__file__).resolve()), "--evaluate", str(own_format), str(request), str(out)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, env=os.environ | SETTINGS)
    if done.returncode != 0:
        said = "\n".join(done.stderr.splitlines()[-5:])
        raise UnavailableError(f"its checkpoint could not be evaluated:\n{said}")
    return {text: Quality(**found) for text, found in json.loads(done.stdout.splitlines()[-1]).items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a dense model directory (default: SmolLM2, fetched)")
    parser.add_argument("--blocks", type=int, help="of the model only the first so many")
    parser.add_argument("--text", type=Path, help="a text file (default: pydoc and pydoc-heldout)")
    parser.add_argument("--peers", type=names, default=["gptqmodel"], help=f"all, or of {', '.join(PEERS)}")
    parser.add_argument("--as-stored", action="store_true", help="peers in the model's own dtype as well")
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
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peers == ["all"]:
        options.peers = list(PEERS)
    unknown = [peer for peer in options.peers if peer not in PEERS]
    if unknown:
        parser.error(f"--peers {','.join(unknown)}: allowed are {', '.join(PEERS)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.client:
        name, request, out, dtype = options.client
        given = {"out": out, "dtype": dtype, "options": PEERS[name].options}
        CLIENTS[PEERS[name].client](json.loads(Path(request).read_text()) | given)
        return 0
    if options.evaluate:
        own, request, out = options.evaluate
        found = evaluate(json.loads(Path(request).read_text()), Path(out), transformers=own == "True")
        print(json.dumps({text: asdict(quality) for text, quality in found.items()}))
        return 0
    try:
        model = options.model or fetch(ROOT / "demo" / NAME, ROOT / "demo" / "cache")
    except FetchError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        return 1
    folder = options.keep or Path(tempfile.mkdtemp(prefix="gptq-peers-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if options.blocks is not None:
            model = first_blocks(model, options.blocks, folder)
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
        **token_ids(options, model, calibration, held_out),
    }
    request = folder / "request.json"
    request.write_text(json.dumps(job))
    costs: dict[str, list[Cost]] = {}
    quality: dict[str, dict[str, Quality]] = {}
    for run in runs(options, job, calibration):
        out = folder / run.name.replace(" ", "-")
        filled = [{"OUT": str(out), "JOB": str(request)}.get(word, word) for word in run.command]
        try:
            for _ in range(options.repeats):
                if run.peer is not None:
                    shutil.rmtree(out, ignore_errors=True)
                cost = measured(filled, folder / f"{out.name}.log", os.environ | SETTINGS)
                costs.setdefault(run.name, []).append(cost)
                print(f"{run.name}: {cost.wall_seconds:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
            quality[run.name] = evaluated_apart(run, request, out)
        except UnavailableError as error:
            if run.peer is None:
                raise SystemExit(f"bench_peers: {error}") from error
            costs.pop(run.name, None)
            print(f"{run.name} is left out: {error}", flush=True)
    if not costs:
        raise SystemExit("bench_peers: nothing ran")
    return report(options, model, costs, quality)


def report(
    options: argparse.Namespace,
    model: Path,
    costs: dict[str, list[Cost]],
    quality: dict[str, dict[str, Quality]],
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
        f" peers in {peer_dtype()}"
    )
    width = max(16, *(len(name) + 2 for name in middle))
    summary: dict[str, Any] = {"model": model.name, "base": base, "peer_dtype": peer_dtype(), "runs": {}}
    print(_heads("", width, (("wall s", 8), ("cpu s", 8), ("GiB", 7))))
    for name, cost in middle.items():
        first = middle[base]
        figures = [
            ("wall", cost.wall_seconds, first.wall_seconds, "8.1f"),
            ("cpu", cost.cpu_seconds, first.cpu_seconds, "8.1f"),
            ("rss", cost.peak_rss_bytes / 2**30, first.peak_rss_bytes / 2**30, "7.2f"),
        ]
        print(f"{name:<{width}}{_line(figures)}")
        summary["runs"][name] = {**asdict(cost), "ratios": _ratios(figures), "texts": {}}
    for text in quality[base]:
        print(_heads(text, width, (("KL", 9), ("gap", 9))) + f"{'top-1':>9}{'ppl':>10}")
        for name in middle:
            mine, other = quality[name][text], quality[base][text]
            figures = [("kl", mine.kl, other.kl, "9.4f"), ("gap", mine.gap, other.gap, "9.2%")]
            print(f"{name:<{width}}{_line(figures)}{mine.top1:>9.2%}{mine.perplexity:>10.3f}")
            summary["runs"][name]["texts"][text] = {
                **asdict(mine), "gap": mine.gap, "ratios": _ratios(figures)
            }  # fmt: skip
        print(f"{'dense':<{width}}{'':>41}{quality[base][text].dense_perplexity:>10.3f}")
    print()
    return summary


_Figure = tuple[str, float, float, str]
"""What it is, of this run, of the first one, how to write it."""


def _heads(text: str, width: int, heads: tuple[tuple[str, int], ...]) -> str:
    return f"\n{text:<{width}}" + "".join(f"{head:>{size}}{'':>7}" for head, size in heads)


def _line(figures: list[_Figure]) -> str:
    return "".join(f"{value:{form}}{_times(value, of):>7}" for _, value, of, form in figures)


def _times(value: float, of: float) -> str:
    return f"x{value / of:.2f}" if of else ""


def _ratios(figures: list[_Figure]) -> dict[str, float]:
    return {name: round(value / of, 3) for name, value, of, _ in figures if of}


if __name__ == "__main__":
    raise SystemExit(main())
