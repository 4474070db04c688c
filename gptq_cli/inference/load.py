"""From a checked checkpoint and a placement to a model that generates.

The skeleton of the checkpoint stays on the meta device until its linears are replaced. Every tensor then goes
from its file straight to the device where it will be used, one linear at a time. No dense copy of the model
is ever made: the peak is the packed model plus the unpacked codes of one linear.

A module that the map puts on the CPU beside other devices keeps its tensors on the CPU, in the layout of the
main device; accelerate's hooks move them there for each forward.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.checkpoint.checkpoint import PackedInfo, QuantizedCheckpoint, read_packed
from gptq_cli.checkpoint.codes import codes_of
from gptq_cli.checkpoint.zeros import ZerosTally
from gptq_cli.config import KernelChoice
from gptq_cli.devices.accelerators import current_accelerator, torch_device, working_on
from gptq_cli.devices.host_memory import trim_heap
from gptq_cli.errors import CheckpointError, ConfigError
from gptq_cli.evaluation.generation_config import read_generation_config
from gptq_cli.gptq.packing import PackedTensors
from gptq_cli.inference.crossover import Crossovers, intra_op_threads
from gptq_cli.inference.experts import drop_packed, expert_linear, put_bias
from gptq_cli.inference.gptqmodel_linear import GptqmodelKernels, GptqmodelLinear
from gptq_cli.inference.packed_linear import PackedLinear
from gptq_cli.inference.saving import answer_for
from gptq_cli.inference.scratch import Scratch
from gptq_cli.model.conversion import tied_groups
from gptq_cli.model.expert_linears import ExpertLinear
from gptq_cli.model.fill import fill_dense
from gptq_cli.model.quiet import quiet_libraries
from gptq_cli.model.streamed import StreamedReader
from gptq_cli.model.text_part import language_model, output_head
from gptq_cli.placement.device import CPU, Device
from gptq_cli.placement.names import owner
from gptq_cli.placement.placement import Placement, PlacementEntry
from gptq_cli.results.load import KernelCount

OnLinear = Callable[[int, int], None]
"""Called with (linears done, linears in all)."""
OnNote = Callable[[str], None]
"""Called with a sentence wherever the files were read differently from what the config says."""

QuantizedModule = PackedLinear | GptqmodelLinear
_TRIM_BYTES = 1 << 25


def default_placement(checkpoint: QuantizedCheckpoint) -> Placement:
    """Everything on the current accelerator, on the CPU where there is none; the reason says why."""
    device = current_accelerator()
    if device.is_accelerator:
        reason = f"no device map was given: {device} is the current accelerator"
    else:
        reason = "no device map was given, and this machine has no accelerator"
    return Placement((PlacementEntry("", device, checkpoint.packed_bytes, True),), device, reason)


def load_quantized(
    checkpoint: QuantizedCheckpoint,
    placement: Placement,
    *,
    kernel_choice: KernelChoice = "auto",
    on_linear: OnLinear = lambda done, total: None,
    on_note: OnNote = lambda text: None,
) -> Any:
    """The Transformers model, ready for `generate`: eval, no gradients, packed linears, every tensor placed.

    `checkpoint.model` becomes this model. Raises `CheckpointError` naming the tensor that cannot be read or
    is not supported, and `ConfigError` where `kernel_choice` is not installed or does not support the
    placement.

    Repacking runs on one thread. That keeps up with most disks, and on a busy machine it is a hundred times
    faster than thousands of small operations that each wait for all threads.
    """
    if any(device.kind in ("disk", "meta") for device in placement.devices):
        raise CheckpointError(
            "the device map puts modules on disk; allowed when loading: accelerators and cpu",
            hint="map those modules to cpu, or load on the CPU alone: --device-map cpu",
        )
    model = checkpoint.model
    model.generation_config = read_generation_config(checkpoint.directory, model)
    language_model(model).generation_config = model.generation_config
    crossovers = Crossovers(torch.get_num_threads())
    gptqmodel = GptqmodelKernels() if kernel_choice == "gptqmodel" else None
    if gptqmodel is not None and placement.offloaded:
        raise ConfigError(
            "kernel is 'gptqmodel', whose modules cannot be moved, but the map has cpu beside other devices",
            hint="leave cpu out of the device map, or use --kernel auto",
        )
    with checkpoint.reader() as reader, intra_op_threads(1):
        replacer = _LinearReplacer(
            checkpoint, placement, reader, crossovers, kernel_choice, gptqmodel, on_linear
        )
        replacer.replace_linears()
        for sentence in replacer.zeros.sentences():
            on_note(sentence)
        fill_dense(
            model,
            checkpoint.conversion,
            checkpoint.keys,
            reader.get,
            lambda name: torch_device(placement.device_of(name)),
            checkpoint.dtype,
            on_untied=lambda names: on_note(untied(*names)),
        )
    model.eval().requires_grad_(False)
    if gptqmodel is not None:
        gptqmodel.finish(model, desc_act=checkpoint.desc_act)
    head = output_head(model)
    if head is not None:
        head.register_forward_pre_hook(_contiguous_input)
    if len(placement.devices) > 1:
        _dispatch(model, placement)
        _set_current_devices(model, checkpoint.blocks, placement)
    answer_for(model, checkpoint)
    trim_heap()
    return model


class _LinearReplacer:
    """Replaces the linears of one checkpoint's skeleton."""

    def __init__(
        self,
        checkpoint: QuantizedCheckpoint,
        placement: Placement,
        reader: StreamedReader,
        crossovers: Crossovers,
        kernel_choice: KernelChoice,
        gptqmodel: GptqmodelKernels | None,
        on_linear: OnLinear,
    ) -> None:
        self.checkpoint, self.placement, self.reader = checkpoint, placement, reader
        self.crossovers, self.kernel_choice, self.on_linear = crossovers, kernel_choice, on_linear
        self.gptqmodel = gptqmodel
        self.scratch = Scratch()
        self.zeros = ZerosTally()
        self.done = 0
        self.untrimmed_bytes = 0

    def replace_linears(self) -> None:
        """Replace every quantized linear, and every fused experts module, by a packed module."""
        model = self.checkpoint.model
        places = self._places()
        for info in self.checkpoint.linears:
            packed = self._pack(info, info.name)
            for name in (info.name, *places.get(info.name, ())):
                model.set_submodule(name, packed)
        owners: dict[nn.Module, str] = {}
        for info in self.checkpoint.experts:
            linear = expert_linear(self.checkpoint, info)
            owners[linear.owner] = (info.fused_into or "").rpartition(".")[0]
            model.set_submodule(info.name, self._pack(info, info.name, linear))
        for module, name in owners.items():
            drop_packed(name, module)

    def _places(self) -> dict[str, tuple[str, ...]]:
        """Packed linear -> others that have its weight in the model, and none in the files."""
        places: dict[str, tuple[str, ...]] = {}
        for names in tied_groups(self.checkpoint.model):
            stored = [name for name in names if name in self.checkpoint.keys.origins]
            others = tuple(owner(name) for name in names if name not in stored)
            places |= {owner(name): others for name in stored[:1]}
        return places

    def _pack(
        self, info: PackedInfo, module_name: str, expert: ExpertLinear | None = None
    ) -> QuantizedModule:
        storage_device = self.placement.device_of(module_name)
        execution_device = self._execution_device(storage_device)
        packed, bias = read_packed(self.reader, info, torch_device(execution_device), self.zeros)
        dtype = self.checkpoint.dtype
        bias = None if bias is None else bias.to(dtype, copy=True)
        if expert is not None and bias is not None and expert.tensor.bias is not None:
            put_bias(expert, bias.to(torch_device(storage_device)))  # the module's own forward adds it
            bias = None
        if self.gptqmodel is not None:
            module: QuantizedModule = self.gptqmodel.build(info, packed, bias, dtype)
        else:
            module = self._own(info, packed, bias)
        self._trim_sometimes(packed.qweight.numel() * packed.qweight.element_size())
        self.done += 1
        self.on_linear(self.done, len(self.checkpoint.linears) + len(self.checkpoint.experts))
        return module if storage_device == execution_device else module.to(torch_device(storage_device))

    def _own(self, info: PackedInfo, packed: PackedTensors, bias: Tensor | None) -> PackedLinear:
        return PackedLinear(
            codes_of(info, packed),
            bias=bias,
            dtype=self.checkpoint.dtype,
            crossovers=self.crossovers,
            scratch=self.scratch,
            kernel_choice=self.kernel_choice,
        )

    def _trim_sometimes(self, read_bytes: int) -> None:
        """Return freed memory to the system after every 32 MiB read.

        Aligned blocks do not fit into the gaps that blocks of the same size left. Without this the heap would
        grow by the size of the files, in addition to the model.
        """
        self.untrimmed_bytes += read_bytes
        if self.untrimmed_bytes >= _TRIM_BYTES:
            self.untrimmed_bytes = 0
            trim_heap()

    def _execution_device(self, storage_device: Device) -> Device:
        """Where the module computes: offloaded modules on the main device, whose layout they need."""
        offloaded = storage_device.kind == "cpu" and bool(self.placement.offloaded)
        return self.placement.main_device if offloaded else storage_device


def untied(first: str, second: str) -> str:
    """The note about two tensors that are tied in the config and differ in the files."""
    return (
        f"{first} and {second} are one tensor by the config (tie_word_embeddings), but the files hold two "
        "that differ: both are used as they are, as in Transformers; readers that tie them compute "
        "something else"
    )


def _contiguous_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give the output head's input its own strides.

    The last position of a prompt is a slice with the strides of the whole prompt. For such an input (a single
    row counts as contiguous) and a weight without gradients, torch's matmul uses bmm instead of mm and copies
    the whole weight, which takes as long as all blocks.
    """
    if not inputs or inputs[0].dim() < 3:
        return inputs
    return (inputs[0].reshape(-1, inputs[0].shape[-1]).view(inputs[0].shape), *inputs[1:])


def _dispatch(model: Any, placement: Placement) -> None:
    from accelerate import dispatch_model

    with quiet_libraries():
        dispatch_model(
            model,
            device_map=placement.accelerate_map(),
            main_device=placement.main_device.for_accelerate,
            skip_keys=model._skip_keys_device_placement,
            offload_buffers=True,
        )


def _set_current_devices(model: nn.Module, blocks: Sequence[str], placement: Placement) -> None:
    """Make each block's device the current one while it runs: accelerate only moves tensors."""
    main = placement.main_device
    for name in blocks:
        storage_device = placement.device_of(name)
        block, device = (
            model.get_submodule(name),
            torch_device(main if storage_device == CPU else storage_device),
        )
        block.forward = _with_device(block.forward, device)


def _with_device(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with working_on(device):
            return forward(*args, **kwargs)

    return run


def compile_forward(model: Any) -> None:
    """Let torch.compile fuse the operations between the kernels; the first calls then take a minute.

    Never done by default. `dynamic`: one compilation for prompts of every length.
    """
    model.forward = torch.compile(model.forward, dynamic=True)


def packed_linears(model: nn.Module) -> dict[str, QuantizedModule]:
    """Name -> module of every packed linear."""
    kinds = (PackedLinear, GptqmodelLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def kernel_counts(model: nn.Module) -> tuple[KernelCount, ...]:
    """How many linears run on which kernel and why, the most frequent first."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(list)
    for module in packed_linears(model).values():
        counts[module.kernel_name, module.reason].append(module.max_fused_tokens)
    return tuple(
        KernelCount(kernel=kernel, linears=len(crossings), reason=_with_crossing(reason, crossings))
        for (kernel, reason), crossings in sorted(counts.items(), key=lambda item: (-len(item[1]), item[0]))
    )


def _with_crossing(reason: str, crossings: list[int]) -> str:
    if not any(crossings):
        return reason
    low, high = min(crossings), max(crossings)
    tokens = str(low) if low == high else f"{low} to {high}, by shape"
    return f"{reason}; above {tokens} tokens at once: dequantize (measured at load)"


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; tied ones count once."""
    tensors: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
