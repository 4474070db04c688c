"""A complete model in memory, and a look at its numbers.

`load_resident`: Transformers reads the shards, accelerate dispatches by the placement. A comparison with the
dense model needs it; quantizing does not, see block_stream.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.accelerate import expand_device_map

from gptq_cli.devices.accelerators import torch_device
from gptq_cli.devices.out_of_memory import is_out_of_memory
from gptq_cli.errors import CheckpointError, ModelError, NonFinite
from gptq_cli.model.conversion import Conversion
from gptq_cli.model.fill import fill_dense
from gptq_cli.model.model_class import load_model
from gptq_cli.model.packed_codes import is_said_left_over
from gptq_cli.model.quiet import no_random_traces, quiet_libraries
from gptq_cli.model.streamed import StreamedReader
from gptq_cli.placement.placement import Placement
from gptq_cli.wording import names_text, number_of

if TYPE_CHECKING:
    from gptq_cli.model.skeleton import Skeleton

_CHUNK_ELEMENTS = 1 << 24


def load_resident(skeleton: Skeleton, placement: Placement) -> Any:
    """The whole model in memory, by the placement: eval, no gradients, no cache, dtype of the skeleton.

    Where the files hold weights in few bits, or the config describes a quantization that is not there, they
    are read here, one tensor at a time: Transformers would build modules of its own for them.

    Raises `ModelError` when a weight is missing or has another shape than the config asks for, and
    `SourceChanged` when a file has changed since the skeleton was made.
    """
    skeleton.files.check()
    if skeleton.files.decoded is not None or is_said_left_over(skeleton.files):
        return _filled(skeleton, placement)
    device_map = _device_map(skeleton, placement)
    extra: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    with quiet_libraries(), no_random_traces():
        try:
            model, info = load_model(
                skeleton.config,
                skeleton.files.directory,
                trust_remote_code=skeleton.ref.trust_remote_code,
                dtype=skeleton.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below, all at once
                **extra,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(f"{skeleton.files.source} cannot be loaded: {error}") from error
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            found = sorted(str(item) for item in info[kind])
            raise ModelError(
                f"{skeleton.files.source}: {kind.replace('_', ' ')}: {names_text(found, 5)}",
                hint="fetch the model again",
            )
    model.requires_grad_(False)
    model.config.use_cache = False
    _unmap(model)
    skeleton.files.check()
    return model.eval()


def _filled(skeleton: Skeleton, placement: Placement) -> Any:
    """A copy of the skeleton's model, filled tensor by tensor, and dispatched as Transformers does it."""
    model = copy.deepcopy(skeleton.model)
    files = skeleton.files
    try:
        with StreamedReader(files.directory, files.tensors, files.stamps) as reader:
            fill_dense(
                model,
                Conversion(model),
                skeleton.keys,
                reader.get,
                lambda name: torch_device(placement.device_of(name)),
                skeleton.dtype,
            )
    except CheckpointError as error:
        raise ModelError(f"{files.source} cannot be loaded: {error.message}", hint=error.hint) from error
    model.requires_grad_(False)
    model.config.use_cache = False
    if len(placement.devices) > 1:
        from accelerate import dispatch_model

        with quiet_libraries():
            dispatch_model(
                model,
                device_map=placement.accelerate_map(),
                main_device=placement.main_device.for_accelerate,
                skip_keys=model._skip_keys_device_placement,
            )
    return model.eval()


def _unmap(model: nn.Module) -> None:
    """Copy tensors on the CPU into memory of their own: Transformers leaves them mapped, so writing to a file
    would change the model, and truncating one would end the process (SIGBUS)."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _device_map(skeleton: Skeleton, placement: Placement) -> dict[str, int | str] | None:
    """The placement in Transformers' form; None for a plain CPU run.

    Transformers finds the entry of a parameter with a regular expression that ignores component borders:
    "model.layers.1" also matches "model.layers.10". Where that would misplace a tensor, the entry that should
    match is split into its children until both interpretations agree.
    """
    entries = placement.accelerate_map()
    if set(entries.values()) == {"cpu"}:
        return None
    if set(entries) == {""}:
        return entries
    names = [*dict.fromkeys([*skeleton.model.state_dict(), *(n for n, _ in skeleton.model.named_buffers())])]
    for _ in range(64):
        expanded = expand_device_map(entries, names)
        wrong = [name for name in names if expanded[name] != entries[_owner(name, entries)]]
        if not wrong:
            return entries
        owner = _owner(wrong[0], entries)
        entries = _split(skeleton.model, entries, owner)
    raise ModelError("the device map cannot be expressed for transformers: some names contain others")


def _owner(name: str, entries: Mapping[str, int | str]) -> str:
    probe = name
    while probe not in entries:
        if not probe:
            raise ModelError(f"the placement does not cover {name}")
        probe = probe.rpartition(".")[0]
    return probe


def _split(model: nn.Module, entries: Mapping[str, int | str], owner: str) -> dict[str, int | str]:
    module = model.get_submodule(owner)
    below = [name for name, _ in module.named_children()]
    below += [name for name, _ in module.named_parameters(recurse=False)]
    below += [name for name, _ in module.named_buffers(recurse=False)]
    result: dict[str, int | str] = {}
    for name, device in entries.items():
        if name == owner:
            result.update({f"{owner}.{child}": device for child in below})
        else:
            result[name] = device
    return result


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise `NonFinite`, with the first such value and its position, if `tensor` holds NaN or infinity."""
    if tensor.numel() == 0 or tensor.element_size() == 1:
        return
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        low, high = torch.aminmax(flat[start : start + _CHUNK_ELEMENTS])
        if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
            continue
        chunk = flat[start : start + _CHUNK_ELEMENTS]
        index = start + int(torch.nonzero(~torch.isfinite(chunk))[0])
        count = int((~torch.isfinite(flat)).sum())
        position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), tensor.shape))
        raise NonFinite(
            f"tensor {name} holds {number_of(count, 'value', 'that is', 'that are')} not finite"
            f"{', the first' if count > 1 else ''} ({flat[index].item()}) at {position}",
            hint="the files are damaged, or values overflowed in float16: fetch the model again, or use "
            "--dtype bfloat16"
            if tensor.dtype == torch.float16
            else "the files are damaged: fetch the model again",
        )
