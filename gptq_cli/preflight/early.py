"""What preflight can say before torch is imported: about the output, the files, and what config.json says.

Each finding carries the id of the rule that would say the same later, with all facts. What is not certain
from the headers of the files alone is left to that rule.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gptq_cli.calibration.text import check_distinct, check_source, too_few_bytes
from gptq_cli.config import QuantizeJob
from gptq_cli.devices.out_of_memory import out_of_memory_told
from gptq_cli.errors import CalibrationError, ModelError
from gptq_cli.findings import Finding, PreflightReport
from gptq_cli.model.facts import ModelFacts
from gptq_cli.model.few_bits_config import quantization_of
from gptq_cli.model.packed_codes import not_decoded
from gptq_cli.model.readable import unreadable_files
from gptq_cli.model.source import ModelFiles, read_json
from gptq_cli.placement.names import fold
from gptq_cli.planning.cases import JobCase, OutputFacts, Work
from gptq_cli.preflight.rules import calibration, device_map, memory, model_files, output, quantization
from gptq_cli.rules import Remark, rules_in
from gptq_cli.wording import number_of

_HIDDEN = ("hidden_size", "n_embd", "d_model")
"""How configs call the width of the hidden states, which most linears of a block read or write."""
_INNER = "intermediate_size"
_DEPTH = 2
"""How deep to look for the config of the text part: thinker_config has a text_config."""
_LESS_TEXT = "give a smaller text, or free memory on this machine"


def early_findings(job: QuantizeJob, files: ModelFiles, place: OutputFacts | None) -> PreflightReport:
    """Errors that are certain before the model is built; `place` None leaves out those about the output."""
    raw = _config(files)
    facts = ModelFacts(
        model=files.source,
        architecture="",
        dtype="",
        hidden_size=0,
        max_positions=_positions(raw),
        already_quantized=_already_quantized(files, raw),
    )
    problems = (*files.problems, *unreadable_files(files.directory, code=job.model.trust_remote_code))
    case = JobCase(
        facts=facts,
        work=Work(job.quantize, job.calibration),
        output=place,
        overwrite=job.overwrite,
        problems=problems,
    )
    known = {problem.kind for problem in problems}
    about_files = [rule for rule in rules_in(model_files) if rule.id in known]
    about_config = [model_files.already_quantized]
    if not any(device.kind == "disk" for device in job.device_map.devices):
        about_config.append(quantization.seq_len_positions)  # else told later, beside a map without disk
    found = [finding for rule in (*about_files, *output.KNOWN_EARLY, *about_config) for finding in rule(case)]
    found += _size_findings(job, files)
    found += _device_findings(job)
    with out_of_memory_told(lambda: "while reading the calibration text", _LESS_TEXT):
        text = _text_findings(job, files)
    found += text
    if not text and any(finding.level == "error" for finding in found):
        found += _besides(job, files)
    return PreflightReport(PreflightReport(tuple(found)).ordered())


def _device_findings(job: QuantizeJob) -> Iterator[Finding]:
    """Devices that cannot be there. Once torch is imported, their rule asks it, and knows a better map."""
    if "torch" in sys.modules:
        return
    limited = [device for device, _ in job.max_memory.limits] if job.max_memory is not None else []
    for subject, devices, hint in (
        (None, job.device_map.devices, "--device-map auto"),
        ("--max-memory", limited, "leave --max-memory out"),
    ):
        for device in devices:
            why = _impossible(device.kind)
            if why:
                message = f"{device} is not on this machine: {why}"
                remark = Remark(subject=subject or str(device), message=message, hint=hint)
                yield device_map.device_absent.finding(remark)


def _impossible(kind: str) -> str:
    """Why no device of this kind can be here; "" where one may be."""
    if kind == "mps" and sys.platform != "darwin":
        return "mps is of Apple's computers"
    with suppress(PackageNotFoundError):
        built = version("torch")
        if kind in ("cuda", "xpu") and built.endswith("+cpu"):
            return f"torch {built} is built for the cpu alone"
    return ""


def _text_findings(job: QuantizeJob, files: ModelFiles) -> list[Finding]:
    found = []
    for source in job.calibration.sources:
        try:
            check_source(source.name)
        except CalibrationError as error:
            found += _about_text(source.name, files, error)
    if found:
        return found
    try:
        check_distinct([source.name for source in job.calibration.sources])
    except CalibrationError as error:
        return _about_text(job.calibration.words, files, error)
    return []


def _about_text(source: str, files: ModelFiles, error: CalibrationError) -> list[Finding]:
    case = calibration.TextCase(model=files.source, source=source, failure=error)
    return calibration.calibration_text(case)


def _besides(job: QuantizeJob, files: ModelFiles) -> Iterator[Finding]:
    """What is said beside other errors. Alone it is left to its rule, which works out the best remedy."""
    patterns = [entry.pattern for entry in job.device_map.rules if entry.device.kind == "disk"]
    if patterns:
        yield memory.disk_offload.finding(
            Remark(
                subject=", ".join(pattern or "rest" for pattern in patterns),
                message=memory.NO_DISK,
                hint="gptq inspect-map with the same options says which change avoids it",
                modules=tuple(patterns),
            )
        )
    data = job.calibration
    for source, samples in zip(data.sources, data.windows_by_source(), strict=True):
        name = source.name
        size = too_few_bytes(name, samples * (data.seq_len - 1))
        if size is not None:
            words = (
                f"{name} has {number_of(size, 'byte')}, too few for {number_of(samples, 'window')} of "
                f"{data.seq_len} tokens"
            )
            hint = "give a longer text, or lower --samples and --seq-len"
            yield from _about_text(name, files, CalibrationError(words, hint=hint))


def _already_quantized(files: ModelFiles, raw: Mapping[str, Any]) -> str | None:
    """Why the weights are codes that cannot be decoded; None where the headers have yet to be fetched."""
    if not raw or not files.tensors:
        return None
    with suppress(ModelError):  # opening the model raises it
        return not_decoded(quantization_of(files.directory, raw), files.tensors)
    return None


def _positions(raw: Mapping[str, Any]) -> int | None:
    """The positions that the text part of config.json names; None where that is left to its class."""
    text = raw.get("text_config")
    named = (text if isinstance(text, Mapping) else raw).get("max_position_embeddings")
    return named if type(named) is int and named > 0 else None


def _size_findings(job: QuantizeJob, files: ModelFiles) -> Iterator[Finding]:
    """Whether groups fit the sizes in config.json. Bits and settings by module are left to the rules."""
    config = job.quantize
    columns = input_columns(files)
    if config.modules or not columns:
        return
    named = {size: f"{size} ({key} in config.json)" for key, size in columns.items()}
    group = config.group_size
    if isinstance(group, int) and group != -1:
        for rule, verb, wrong in (
            (quantization.group_too_large, "is larger than", [k for k in named if group > k]),
            (quantization.group_divides, "does not divide", [k for k in named if group <= k and k % group]),
        ):
            if wrong:
                yield rule.finding(
                    Remark(
                        subject=f"--group-size {group}",
                        message=f"group size {group} {verb} the input columns "
                        f"{', '.join(named[k] for k in sorted(wrong))}",
                        hint=quantization.group_size_hint(
                            math.gcd(*named, *(shape[-1] for shape in _block_matrices(files)))
                        ),
                    )
                )


def input_columns(files: ModelFiles) -> dict[str, int]:
    """Input columns (K) that linears of the decoder blocks certainly have, by the key in config.json.

    A width is certain where most matrices of the largest family of numbered modules have it on one side; the
    inner one where a matrix leads from there back to the width. Empty where config.json names neither.
    """
    matrices = _block_matrices(files)
    if not matrices:
        return {}
    for config in _configs(_config(files)):
        for key in _HIDDEN:
            width = config.get(key)
            if type(width) is not int or 2 * sum(width in shape for shape in matrices) <= len(matrices):
                continue
            inner = config.get(_INNER)
            found = {key: width}
            if type(inner) is int and inner != width and (width, inner) in matrices:
                found[_INNER] = inner
            return found
    return {}


def _config(files: ModelFiles) -> Mapping[str, Any]:
    """config.json; empty where it cannot be read."""
    with suppress(OSError, ValueError):  # opening the model says what is wrong with it
        raw = read_json(files.directory / "config.json")
        return raw if isinstance(raw, Mapping) else {}
    return {}


def _configs(raw: Any, depth: int = _DEPTH) -> Iterator[Mapping[str, Any]]:
    """config.json and the configs inside it."""
    if isinstance(raw, Mapping):
        yield raw
        for inner in raw.values() if depth else ():
            yield from _configs(inner, depth - 1)


def _block_matrices(files: ModelFiles) -> Sequence[tuple[int, ...]]:
    """Shapes of the matrices in the list of modules that holds most weights."""
    weights: Counter[str] = Counter()
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for tensor in files.tensors:
        family, star, _ = fold(tensor.name).partition(".*.")
        if star and tensor.name.endswith(".weight") and len(tensor.shape) == 2:
            weights[family] += math.prod(tensor.shape)
            shapes.setdefault(family, []).append(tuple(tensor.shape))
    return shapes[weights.most_common(1)[0][0]] if weights else ()
