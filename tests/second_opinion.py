"""A checkpoint read without the package under test: format, names and arithmetic written down again.

`second_opinion` unpacks the packed tensors with a few lines of its own, puts the weights back under the names
and in the layout of the source's files, or where these have no such tensor, of the model's parameters, and
lets Transformers open that as the plain model that it now is.
What the package's own `load` computes must equal it. `examine` does the whole round for one tiny model of an
architecture: quantize, verify, load, compare."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import gptq_cli
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.model.text_part import language_model
from gptq_cli.results.run import RunReport
from tests import tiny
from tests.shares import block_weights

GROUP, SAMPLES, SEQ_LEN = 16, 8, 64
LOGITS_LIMIT = 2e-3
"""Largest difference between both readings, relative to the largest logit."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What came of one tiny model that was quantized."""

    report: RunReport
    errors: tuple[str, ...]
    """What `load --verify` calls an error."""
    share: float
    """Quantized part of the two- and three-dimensional weights of decoder blocks that text reaches, 0 to
    1."""
    logits: float
    """Largest difference between our model's logits and the second opinion's, relative to the largest
    logit."""
    kl: float
    """Mean KL(dense ‖ quantized) per token, nats."""
    rtn_kl: float
    """The same where the weights are rounded to nearest instead."""

    @property
    def problem(self) -> str:
        """What is wrong; "" where nothing is."""
        if self.errors:
            return f"unreadable: {self.errors[0]}"
        if self.logits > LOGITS_LIMIT:
            return f"wrong: logits differ by {self.logits:.1e}"
        if self.kl > max(self.rtn_kl, 1e-6):
            return f"no gain: KL {self.kl:.2e}, {self.rtn_kl:.2e} rounded to nearest"
        return ""


def save_source(model: Any, folder: Path) -> Path:
    """Write the model, its tokenizer and a calibration text; return the model's directory."""
    source = folder / "source"
    model.save_pretrained(source)
    tiny.save_tokenizer(source)
    (folder / "text.txt").write_text(" ".join(topics.values())[:30_000])
    return source


def examine(
    model_class: Any, source: Path, out: Path, *, recipe: str = "fast", **options: Any
) -> Examination:
    """Quantize `source` (made by `save_source`) to `out`, and compare all there is to compare."""
    report = gptq_cli.quantize(
        source,
        out,
        recipe=recipe,  # type: ignore[arg-type]
        device_map="cpu",
        calibration=str(source.parent / "text.txt"),
        samples=SAMPLES,
        seq_len=SEQ_LEN,
        **{"group_size": GROUP} | options,
    )
    findings = verify_checkpoint(out).findings
    errors = tuple(finding.message for finding in findings if finding.level == "error")
    dense = _opened(model_class, source)[0]
    names = [block.name for block in report.blocks]
    done = sum(linear.in_features * linear.out_features for linear in report.linears)
    expected = logits(dense)
    second, rounded = (second_opinion(model_class, source, out, nearest=which) for which in (False, True))
    found = torch.full_like(second, torch.inf) if errors else logits(gptq_cli.load(out, device_map="cpu"))
    return Examination(
        report=report,
        errors=errors,
        share=done / block_weights(dense, names, report.kept_dense),
        logits=float((found - second).abs().max() / second.abs().max()),
        kl=divergence(expected, second),
        rtn_kl=divergence(expected, rounded),
    )


def logits(model: Any) -> Tensor:  # (1, tokens, vocabulary) float32
    """Of 96 tokens, the same for every model of the tiny vocabulary."""
    ids = torch.arange(96).mul(37).remainder(tiny.VOCAB - 2).add(2)[None]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # Reformer hashes at random
        result: Tensor = language_model(model)(input_ids=ids, use_cache=False).logits
    return result.float()


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean over tokens of KL(expected ‖ found), nats."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def second_opinion(model_class: Any, source: Path, out: Path, *, nearest: bool = False) -> Tensor:
    """Logits of the plain model that the packed tensors stand for; `nearest`: of the source's own weights,
    rounded to nearest in the same places."""
    config = json.loads((out / "quantize_config.json").read_text())
    dense = _opened(model_class, source)[0].state_dict()
    tensors, originals = _tensors(out), dense | _tensors(source)
    experts: dict[str, dict[tuple[int, str, str], Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        owner = name.removesuffix(".qweight")
        parts = {part: tensors.pop(f"{owner}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        weight, original = dequantized(parts, config), originals.get(f"{owner}.weight")
        if original is not None:
            result[f"{owner}.weight"] = _laid_out_as(original, [weight])
        elif match := re.fullmatch(r"(.*)\.(\d+)(?:\.([a-zA-Z_]\w*))?", owner):
            experts.setdefault(match[1], {})[int(match[2]), match[3] or "", "weight"] = weight
        else:  # a name that Transformers takes for the model's own, or refuses
            result[f"{owner}.weight"] = weight
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*)\.(\d+)\.(\w+)\.bias", name)
        if match is not None and match[1] in experts and name not in originals:
            experts[match[1]][int(match[2]), match[3], "bias"] = value
        else:
            result[name] = value
    for owner, found in experts.items():
        result |= _fused_again(owner, found, originals)
    if nearest:
        changed = [
            n for n, v in result.items() if n in originals and not torch.equal(v, originals[n].to(v.dtype))
        ]
        result |= {name: _rounded(originals[name].float(), result[name], config) for name in changed}
    return logits(_plain_model(model_class, source, result))


def dequantized(parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:  # (N, K) float32
    """The weights of one packed linear; 2, 4 and 8 bits, whatever its words hold."""
    group, add = parts["g_idx"].long(), 0 if config["checkpoint_format"] == "gptq_v2" else 1
    bits = 32 * len(parts["qweight"]) // len(group)
    codes = _unpacked(parts["qweight"], bits)[: len(group)]  # (K, N)
    zeros = _unpacked(parts["qzeros"].t(), bits).t()[:, : codes.shape[1]] + add  # (groups, N)
    return ((codes - zeros[group]) * parts["scales"].float()[group]).t()


def _unpacked(words: Tensor, bits: int) -> Tensor:  # (W, X) int32 -> (W · 32 / bits, X)
    shifts = torch.arange(0, 32, bits)[None, :, None]
    return (words[:, None, :] >> shifts & ((1 << bits) - 1)).flatten(0, 1)


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {n: v for file in sorted(directory.glob("*.safetensors")) for n, v in load_file(file).items()}


def _fused_again(
    owner: str, experts: Mapping[tuple[int, str, str], Tensor], originals: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of the source that hold all experts of `owner`, from those of each expert."""
    count = 1 + max(expert for expert, _, _ in experts)
    result = {}
    for kind, dims in (("weight", 3), ("bias", 2)):
        roles = sorted({role for _, role, found in experts if found == kind})
        stacks = [torch.stack([experts[expert, role, kind] for expert in range(count)]) for role in roles]
        inside = [name for name in originals if name.startswith(f"{owner}.")]
        if not inside:  # the files call the module of the experts otherwise
            inside = [name for name in originals if name.startswith(f"{owner.rpartition('.')[0]}.")]
        for name in inside if stacks else ():
            original = originals[name]
            held = len(original) == count if original.ndim == dims else original.ndim == 2 == dims - 1
            if held and len(original) % count == 0 and ("bias" in name) == (kind == "bias"):
                result[name] = _laid_out_as(original, stacks, bias=kind == "bias")
    return result


def _laid_out_as(original: Tensor, parts: Sequence[Tensor], *, bias: bool = False) -> Tensor:
    """The parts as the source's file has them: one of them, or two concatenated or interleaved, transposed or
    not, all experts' rows in one dimension or not, whichever comes nearest to the original."""
    rows = parts[0].ndim - (1 if bias else 2)
    candidates: list[Tensor] = []
    for some in [*itertools.permutations(parts, 1), *itertools.permutations(parts, 2)]:
        if any(part.shape != some[0].shape for part in some):
            continue
        concatenated = torch.cat(some, rows)
        interleaved = torch.stack(some, rows + 1).reshape(concatenated.shape)
        for whole in (concatenated, interleaved):
            candidates += [whole] if bias else [whole, whole.transpose(-1, -2)]
    if original.ndim == parts[0].ndim - 1:
        candidates = [candidate.flatten(0, 1) for candidate in candidates]
    fitting = [candidate for candidate in candidates if candidate.shape == original.shape]
    if not fitting:
        raise AssertionError(f"no layout of {[tuple(p.shape) for p in parts]} gives {tuple(original.shape)}")
    return min(fitting, key=lambda candidate: float((candidate - original.float()).norm()))


def _rounded(original: Tensor, quantized: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Symmetric round-to-nearest in groups along the input columns: the dimension that comes nearer to
    `quantized`."""
    if original.ndim == 1:
        return original
    top = 1 << config["bits"] - 1
    results = []
    for dim in (-1, -2):
        weight = original.transpose(-1, dim)
        size = config["group_size"] if config["group_size"] > 0 else weight.shape[-1]
        if weight.shape[-1] % size:
            continue
        groups = weight.reshape(*weight.shape[:-1], -1, size)
        scale = (groups.abs().amax(-1, keepdim=True) / (top - 0.5)).clamp(min=1e-8)
        values = (groups / scale).round().clamp(-top, top - 1) * scale
        results.append(values.reshape(weight.shape).transpose(-1, dim))
    return min(results, key=lambda value: float((value - quantized.float()).norm()))


def _plain_model(model_class: Any, source: Path, tensors: Mapping[str, Tensor]) -> Any:
    """Transformers' model of a directory with the source's config and these tensors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(source / "config.json", folder)
        plain = {
            name: (value.float() if value.is_floating_point() else value).contiguous().clone()
            for name, value in tensors.items()
        }
        save_file(plain, folder / "model.safetensors", {"format": "pt"})
        model, info = _opened(model_class, folder)
        problems = {kind: info[kind] for kind in ("missing_keys", "mismatched_keys") if info[kind]}
        if problems:
            raise AssertionError(f"second opinion: {problems}")
    return model


def _opened(model_class: Any, folder: Path) -> tuple[Any, Any]:
    """By the method of all classes: that of a class may open more files than the weights."""
    by_all: Any = PreTrainedModel.from_pretrained
    model, info = by_all.__func__(model_class, folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info
