"""`gptq doctor`: what this machine and environment are like, what is slow here, and why. One line each."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gptq_cli.files import reason
from gptq_cli.results.about import Check, DoctorReport

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "datasets")
OPTIONAL = {
    "gptqmodel": "offers its kernels to gptq load",
    "lm_eval": "scores the tasks of --tasks",
}
_GIB = 1 << 30
_LITTLE_DISK_BYTES = 10 * _GIB
_LITTLE_MEMORY_BYTES = 4 * _GIB


def doctor(environ: Mapping[str, str] = os.environ) -> DoctorReport:
    """Look at everything; a part that cannot be looked at is a check that says so."""
    parts: tuple[Callable[[Mapping[str, str]], Iterator[Check]], ...] = (
        _packages,
        _processor,
        _arithmetic,
        _memory,
        _accelerators,
        _disk,
        _hub,
    )
    return DoctorReport(checks=tuple(check for part in parts for check in part(environ)))


def _packages(environ: Mapping[str, str]) -> Iterator[Check]:
    yield Check(name="python", found=f"{platform.python_version()} on {platform.platform()}", verdict="good")
    for name in PACKAGES:
        try:
            yield Check(name=name, found=version(name), verdict="good")
        except PackageNotFoundError:
            yield Check(name=name, found="missing", verdict="error", advice=f"pip install {name}")
    for name, use in OPTIONAL.items():
        try:
            yield Check(name=name, found=version(name), verdict="good")
        except PackageNotFoundError:
            yield Check(name=name, found="not installed", verdict="note", advice=f"optional: it {use}")


def _processor(environ: Mapping[str, str]) -> Iterator[Check]:
    import torch

    from gptq_cli.devices.host_threads import usable_cores

    cores, threads = usable_cores(), torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    yield Check(
        name="processor",
        found=f"{platform.processor() or platform.machine()}, {capability}",
        verdict="good",
    )
    given = environ.get("OMP_NUM_THREADS")
    if threads < cores:
        reason = f"OMP_NUM_THREADS is {given}" if given else "torch was built or told so"
        advice = f"{reason}: {cores - threads} of {cores} cores stay idle; unset it for the full speed"
        yield Check(name="threads", found=f"{threads} of {cores} cores", verdict="warning", advice=advice)
    else:
        yield Check(name="threads", found=f"{threads} of {cores} cores", verdict="good")
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        yield Check(name="onednn", found="present", verdict="good")
    else:
        advice = "16-bit matmuls on the cpu are slow without it; use a torch wheel that has it"
        yield Check(name="onednn", found="missing from this torch", verdict="warning", advice=advice)


def _arithmetic(environ: Mapping[str, str]) -> Iterator[Check]:
    import torch

    from gptq_cli.gptq.matmul import fast_matmul_supported
    from gptq_cli.inference.kernels import cpu_block
    from gptq_cli.model.facts import dtype_name

    for dtype in (torch.bfloat16, torch.float16):
        name = dtype_name(dtype)
        if fast_matmul_supported(dtype, "cpu"):
            yield Check(name=f"{name} on cpu", found="native", verdict="good")
        else:
            advice = f"this processor multiplies {name} slowly: gptq widens it to float32 for the matmuls"
            yield Check(name=f"{name} on cpu", found="no native matmul", verdict="note", advice=advice)
    block = cpu_block()
    if block is None:
        advice = "gptq load dequantizes instead: prompts as fast, text several times slower"
        yield Check(name="int4 on cpu", found="no kernel in this torch", verdict="note", advice=advice)
    else:
        yield Check(name="int4 on cpu", found=f"torch's kernel, blocks of {block} columns", verdict="good")


def _memory(environ: Mapping[str, str]) -> Iterator[Check]:
    from gptq_cli.devices.host_memory import host_memory

    memory = host_memory()
    found = f"{memory.free_bytes / _GIB:.1f} of {memory.total_bytes / _GIB:.1f} GiB free"
    little = memory.free_bytes < _LITTLE_MEMORY_BYTES
    advice = (
        "enough for models of about 1 B parameters; gptq inspect-map MODEL says exactly" if little else ""
    )
    yield Check(name="memory", found=found, verdict="warning" if little else "good", advice=advice)


def _accelerators(environ: Mapping[str, str]) -> Iterator[Check]:
    import torch

    from gptq_cli.devices.accelerators import present_devices

    found = [budget for budget in present_devices() if budget.device.is_accelerator]
    for budget in found:
        free, total = budget.free_bytes / _GIB, budget.total_bytes / _GIB
        words = f"{free:.1f} of {total:.1f} GiB free"
        if budget.device.kind == "cuda":
            words = f"{torch.cuda.get_device_name(budget.device.index)}, {words}"
        yield Check(name=str(budget.device), found=words, verdict="good")
    if not found:
        built = (
            torch.version.cuda or getattr(torch.version, "hip", None) or getattr(torch.version, "xpu", None)
        )
        advice = (
            f"torch is built for {built} but sees no device: look at its driver and at CUDA_VISIBLE_DEVICES"
            if built
            else "this torch is built for the cpu alone; everything works, an accelerator is faster"
        )
        yield Check(name="accelerator", found="none", verdict="warning" if built else "note", advice=advice)


def _disk(environ: Mapping[str, str]) -> Iterator[Check]:
    try:
        free = shutil.disk_usage(Path.cwd()).free
    except OSError as error:
        yield Check(name="disk", found=f"the working directory cannot be read: {error}", verdict="error")
        return
    little = free < _LITTLE_DISK_BYTES
    advice = "a 4-bit checkpoint takes about 0.6 GB per billion parameters" if little else ""
    found = f"{free / _GIB:.1f} GiB free here"
    yield Check(name="disk", found=found, verdict="warning" if little else "good", advice=advice)


def _hub(environ: Mapping[str, str]) -> Iterator[Check]:
    try:
        from huggingface_hub import constants, get_token
    except ImportError as error:
        yield Check(
            name="hub",
            found=f"cannot be imported: {error}",
            verdict="error",
            advice="pip install -U huggingface_hub",
        )
        return
    yield _hub_cache(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE:
        advice = "HF_HUB_OFFLINE is set: models must be in the cache, or given as directories"
        yield Check(name="hub", found="offline", verdict="note", advice=advice)
        return
    try:
        token = get_token()
    except OSError as error:
        found = f"the token cannot be read: {reason(error)}: {constants.HF_TOKEN_PATH}"
        advice = "make it readable, or set HF_TOKEN"
        yield Check(name="hub", found=found, verdict="warning", advice=advice)
        return
    if token is None:
        advice = "gated and private models need one: hf auth login"
        yield Check(name="hub", found="online, without a token", verdict="note", advice=advice)
    else:
        yield Check(name="hub", found="online, with a token", verdict="good")


def _hub_cache(path: str) -> Check:
    """The directory that keeps what is fetched, or the one that it would be made in."""
    place = Path(path).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):
        return Check(name="hub cache", found=path, verdict="good")
    made = "" if place == Path(path).absolute() else f": {place}"
    found = f"{path} cannot be written to{made}"
    advice = "to fetch models, set HF_HUB_CACHE to a directory that you may write to"
    return Check(name="hub cache", found=found, verdict="warning", advice=advice)
