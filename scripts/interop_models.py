#!/usr/bin/env python3
"""Do other programs compute what we compute from our checkpoints? Small models of several architectures.

Each is made with random weights, quantized by `gptq quantize` with groups of 32, and opened four times, in
float32:

    ours          `gptq_cli.load`
    second        `tests/second_opinion.py`, which shares no code with the package
    GPTQModel     `GPTQModel.load`, its plain torch kernel
    Transformers  `AutoModelForCausalLM.from_pretrained` with Optimum and GPTQModel, the same kernel

The last two run in the virtual environment of interop_check.py (`.venv-interop`, made on the first run) and
get nothing but the directory and token ids. Figures are the root mean square of the difference to our logits
over that of the logits. The models agree where each reader computes the same of every checkpoint that
`gptq load --target` says it takes, and of no other.

    python scripts/interop_models.py                      all models, some minutes
    python scripts/interop_models.py qwen3_moe llama      some of them
    python scripts/interop_models.py --keep DIR           work in DIR and leave everything there

Exit 0 when all agree, 1 when not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interop_check import CLIENT, ROOT, SETTINGS, difference, environment

sys.path.insert(0, str(ROOT))

MAX_DIFFERENCE = 1e-4
"""All of them compute in float32 from the same codes."""
READERS = ("GPTQModel", "Transformers")
WIDTHS: dict[str, int] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
"""Multiples of 32 wherever a linear is, as every kernel wants them."""
DELTA_NET = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}


@dataclass(frozen=True)
class Case:
    """A model, and how it is quantized."""

    kind: str
    """Its type in Transformers."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of its config beside `WIDTHS` and those of `tests.architectures`."""
    options: tuple[str, ...] = ()
    """Of `gptq quantize`."""


CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama, mixed": Case("llama", options=("--module", "model.layers.*.mlp.down_proj=bits:8,group:64")),
    "llama, a block dense": Case("llama", options=("--module", "model.layers.0=dense")),
    "llama, head quantized": Case("llama", options=("--quantize-head",)),
    "qwen2 (biases)": Case("qwen2"),
    "qwen3_moe": Case("qwen3_moe"),
    "qwen3_moe, mixed": Case(
        "qwen3_moe", options=("--module", "model.layers.*.mlp.experts.*.down_proj=bits:8,group:64")
    ),
    "olmoe": Case("olmoe", {"intermediate_size": 64}),
    "deepseek_v3": Case("deepseek_v3"),
    "llama4_text (transposed)": Case("llama4_text", {"intermediate_size": 128}),
    "qwen3_next (gates)": Case("qwen3_next", DELTA_NET),
    "qwen3_5_text (gates)": Case("qwen3_5_text", DELTA_NET),
    "qwen3_5_moe_text (gates)": Case("qwen3_5_moe_text", DELTA_NET),
    "mixtral (w1, w2, w3)": Case("mixtral"),
    "minimax_m2 (w1, w2, w3)": Case("minimax_m2", {"intermediate_size": 64}),
    "gpt_oss (interleaved)": Case("gpt_oss", {"intermediate_size": 128}),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"all if none is given: {'; '.join(CASES)}")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-interop", help="the readers' environment")
    parser.add_argument("--keep", type=Path, help="work here and leave everything")
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.client:
        client(options.client)
        return 0
    names = options.names or list(CASES)
    if unknown := sorted(set(names) - set(CASES)):
        parser.error(f"unknown: {', '.join(unknown)}; available: {'; '.join(CASES)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    python = environment(options.venv)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="gptq-interop-"))
    try:
        results = {name: try_one(name, folder / str(number)) for number, name in enumerate(names)}
        ask_readers(python, folder, results)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    show(results)
    good = all(result["agree"] for result in results.values())
    print(json.dumps({"agree": good, "client": list(CLIENT), "models": results}))
    return 0 if good else 1


def try_one(name: str, folder: Path) -> dict[str, Any]:
    """Make, quantize and open the model on this side; our logits are left in `folder`."""
    import torch

    import gptq_cli
    from tests import architectures
    from tests.second_opinion import logits, save_source, second_opinion

    case = CASES[name]
    model = build(case)
    source, out = save_source(model, folder), folder / "out"
    gptq(
        "quantize",
        str(source),
        "--out",
        str(out),
        "--group-size",
        "32",
        "--device-map",
        "cpu",
        "--calibration",
        str(folder / "text.txt"),
        "--samples",
        "16",
        "--seq-len",
        "128",
        "--overwrite",
        *case.options,
    )
    targets = [word for reader in READERS for word in ("--target", reader.lower())]
    said = json.loads(gptq("load", str(out), *targets, "--json", allowed=(0, 5)))
    mine = logits(gptq_cli.load(out, device_map="cpu", dtype="float32"))[0]
    torch.save(mine, folder / "ours.pt")
    second = second_opinion(architectures.model_class(case.kind), source, out)[0]
    return {
        "checkpoint": str(out.resolve()),
        "linears": said["linears"],
        "takes": {reader: of["ok"] for reader, of in zip(READERS, said["targets"], strict=True)},
        "quantized to dense": difference(mine, logits(model)[0]),
        "second": difference(mine, second),
    }


def build(case: Case) -> Any:
    """The tiny model with random weights: values of float16, which all readers hold exactly, in float32."""
    import torch

    from tests import architectures, tiny

    config = architectures.tiny_config(case.kind)
    for name, value in (WIDTHS | case.fields).items():
        if name in case.fields or getattr(config, name, None) is not None:
            setattr(config, name, value)
    config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = architectures.model_class(case.kind)._from_config(config, dtype=torch.float32)
    tiny.randomize(model, 0)
    return model.half().float().eval()


def gptq(*words: str, allowed: tuple[int, ...] = (0,)) -> str:
    """The standard output of a command, run in this process. Raises `RuntimeError` with all that it printed
    where it ends otherwise."""
    from gptq_cli.cli.app import main as run

    result, talk = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(result), contextlib.redirect_stderr(talk):
        code = run(words)
    if code not in allowed:
        raise RuntimeError(f"gptq {' '.join(words)} ended with {code}:\n{talk.getvalue()}{result.getvalue()}")
    return result.getvalue()


def ask_readers(python: Path, folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Let every reader open every checkpoint, and add to `results` what came of it."""
    import torch

    for reader in READERS:
        answers = ask(python, folder, reader, [result["checkpoint"] for result in results.values()])
        for result, answer in zip(results.values(), answers, strict=True):
            if "error" in answer:
                result[reader] = answer["error"]
            else:
                mine = torch.load(Path(result["checkpoint"]).with_name("ours.pt"))
                apart = difference(answer["logits"], mine)
                result[reader] = apart if math.isfinite(apart) else "its logits are not finite"
                result[f"{reader} linears"] = answer["packed"]
    for result in results.values():
        del result["checkpoint"]
        result["agree"] = result["second"] <= MAX_DIFFERENCE and all(
            same(result, reader) == result["takes"][reader] for reader in READERS
        )


def same(result: dict[str, Any], reader: str) -> bool:
    """Whether the reader packs as many linears and computes the same."""
    found = result[reader]
    return (
        isinstance(found, float)
        and found <= MAX_DIFFERENCE
        and bool(result[f"{reader} linears"] == result["linears"])
    )


def ask(python: Path, folder: Path, reader: str, checkpoints: list[str]) -> list[dict[str, Any]]:
    """What `reader` says of each checkpoint: "logits" and "packed", or "error".

    A process of its own per reader, since GPTQModel changes Transformers' classes; one that dies at a
    checkpoint is started again behind it.
    """
    import torch

    answers: list[dict[str, Any]] = []
    while len(answers) < len(checkpoints):
        request = folder / "request.json"
        request.write_text(json.dumps([reader, checkpoints[len(answers) :]]))
        done = subprocess.run(
            [str(python), str(Path(__file__).resolve()), "--client", str(request)],
            env=os.environ | SETTINGS | {"TORCHDYNAMO_DISABLE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        with (folder / f"{reader}.log").open("a") as log:
            log.write(done.stdout + done.stderr)
        for checkpoint in checkpoints[len(answers) :]:
            if not (path := answer_path(reader, checkpoint)).is_file():
                answers.append({"error": f"its process ended with {done.returncode}"})
                break
            answers.append(torch.load(path))
    return answers


def answer_path(reader: str, checkpoint: str) -> Path:
    return Path(f"{checkpoint}.{reader}.pt")


def client(request: Path) -> None:
    """A reader's side; runs in its environment and knows nothing of this package."""
    import torch

    ids = torch.arange(96).mul(37).remainder(510).add(2)[None]  # as tests.second_opinion.logits
    reader, checkpoints = json.loads(request.read_text())
    open_model = {"GPTQModel": by_gptqmodel, "Transformers": by_transformers}[reader]
    for checkpoint in checkpoints:
        print(f"\n--- {checkpoint}", file=sys.stderr)
        try:
            model = torch.nn.Module.float(open_model(checkpoint).eval())  # Transformers' own raises
            with torch.inference_mode():
                logits = model(input_ids=ids, use_cache=False).logits[0]
            packed = sum(hasattr(module, "qweight") for module in model.modules())
            answer = {"logits": logits, "packed": packed}
        except Exception as error:  # noqa: BLE001  what a reader says is a result
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]}
        torch.save(answer, answer_path(reader, checkpoint))


def by_gptqmodel(checkpoint: str) -> Any:
    """The model inside GPTQModel's own."""
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.utils.backend import BACKEND

    return GPTQModel.load(checkpoint, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model


def by_transformers(checkpoint: str) -> Any:
    """Transformers' model, its linears replaced by GPTQModel's."""
    import torch
    from transformers import AutoModelForCausalLM, GPTQConfig

    options = GPTQConfig(bits=4, backend="torch")
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map="cpu", dtype=torch.float16, quantization_config=options
    )


def show(results: dict[str, dict[str, Any]]) -> None:
    """One line per model."""
    width = max(map(len, results)) + 2
    print(f"\n{'':<{width}}{'linears':>8}{'second':>10}" + "".join(f"{reader:>14}" for reader in READERS))
    for name, result in results.items():
        cells = "".join(f"{cell(result, reader):>14}" for reader in READERS)
        said = "" if result["agree"] else "  THEY DO NOT AGREE"
        print(f"{name:<{width}}{result['linears']:>8}{result['second']:>10.1e}{cells}{said}")
    print("\n(no): as `gptq load --target` says")
    for name, result in results.items():
        for reader in READERS:
            if isinstance(result[reader], str):
                print(f"{name}, {reader}: {result[reader]}")
    print()


def cell(result: dict[str, Any], reader: str) -> str:
    """The difference, or that there is none; in brackets where the reader is not said to take it."""
    found = result[reader]
    shown = f"{found:.1e}" if isinstance(found, float) else "fails"
    return shown if result["takes"][reader] else "(no)" if not same(result, reader) else f"({shown})"


if __name__ == "__main__":
    raise SystemExit(main())
