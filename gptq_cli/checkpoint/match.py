"""Matching the tensors of a quantized checkpoint with the modules of its model, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from gptq_cli.checkpoint.checkpoint import PackedInfo, QuantizedCheckpoint
from gptq_cli.checkpoint.format import PARTS, CheckpointFormat, PackedFormat
from gptq_cli.errors import CheckpointError, ModelError
from gptq_cli.model.blocks import find_blocks, is_linear, shape
from gptq_cli.model.conversion import Conversion, KeyMap
from gptq_cli.model.expert_linears import unfuse
from gptq_cli.model.expert_names import ExpertNames, ExpertPlace, merged_names
from gptq_cli.model.experts import find_experts
from gptq_cli.model.source import ModelFiles
from gptq_cli.wording import and_others, number_of

_SCALE_DTYPES = ("float16", "bfloat16", "float32")
_DAMAGED = "the checkpoint is incomplete or damaged: fetch it again"
_OF_SETTINGS = (
    "compare bits, group_size and dynamic in the quantization config with what it was published with: the "
    "tensors are there, and are not as it says"
)


class CheckpointMatcher:
    """Matches the tensors of a checkpoint with the model's modules, and collects what does not match."""

    def __init__(
        self,
        directory: Path,
        raw: Mapping[str, Any],
        form: CheckpointFormat,
        files: ModelFiles,
        config: Any,
        model: Any,
        dtype: torch.dtype,
    ) -> None:
        self.directory, self.raw, self.form, self.files = directory, raw, form, files
        self.config, self.model, self.dtype = config, model, dtype
        self.by_name = {tensor.name: tensor for tensor in files.tensors}
        self.conversion = Conversion(model)
        try:
            self.blocks = find_blocks(model)[1]
        except ModelError:
            self.blocks = ()
        found = find_experts(model, self.blocks)
        self.dense_experts = found.dense
        self.names = ExpertNames(self.conversion, found.experts)
        unfuse(model, found.experts)
        self.errors: list[str] = []
        self._misfits = 0
        self.notes: list[str] = list(form.notes)

    def checkpoint(self) -> QuantizedCheckpoint:
        """The checkpoint. Raises a `CheckpointError` that names the first thing that does not match."""
        sources = [name.removesuffix(".qweight") for name in self.by_name if name.endswith(".qweight")]
        self._leftovers(set(sources))
        packed = tuple(info for source in sources if (info := self._packed(source)) is not None)
        companions = {f"{source}.{part}" for source in sources for part in PARTS}
        companions |= {name for source in sources if self._foreign_bias(name := f"{source}.bias")}
        names = [name for name in self.by_name if name not in companions]
        merged = dict(merged_names(self.names, sources, self.by_name))
        keys = self.conversion.map([*names, *(f"{source}.weight" for source in sources)], merged)
        self._dense(keys, set(sources))
        if not sources and not self.errors:
            self.errors.append(
                f"{self.directory} holds no quantized linears (no tensor name ends in .qweight)"
            )
        if self.errors:
            raise CheckpointError(
                self.errors[0] + and_others(self.errors, "problem"),
                hint=_OF_SETTINGS if self._misfits == len(self.errors) else _DAMAGED,
                problems=tuple(self.errors),
            )
        order = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
        ordered = sorted(packed, key=lambda info: order.get(info.name, len(order)))
        without = sum(not info.has_g_idx for info in packed)
        if without:
            self.notes.append(
                f"{number_of(without, 'linear', 'has', 'have')} no g_idx: column k is in group "
                "k // group_size"
            )
        if keys.unexpected:
            strange = ("that does not belong to the model is", "that do not belong to the model are")
            self.notes.append(f"{number_of(len(keys.unexpected), 'tensor', *strange)} not read")
        return QuantizedCheckpoint(
            directory=self.directory,
            config=self.config,
            config_dict=self.raw,
            format=self.form,
            model=self.model,
            files=self.files,
            dtype=self.dtype,
            blocks=self.blocks,
            linears=tuple(info for info in ordered if info.fused_into is None),
            experts=tuple(info for info in ordered if info.fused_into is not None),
            dense_experts=self.dense_experts,
            conversion=self.conversion,
            keys=keys,
            notes=tuple(self.notes),
        )

    def _misfit(self, error: str) -> None:
        """A tensor that is there is not as the settings say, and these may be what is wrong."""
        self.errors.append(error)
        self._misfits += 1

    def _foreign_bias(self, name: str) -> bool:
        """A bias of a packed linear whose class in the model has none: AutoGPTQ writes one for every
        linear."""
        return name in self.by_name and self.conversion.target_of(name)[0] is None

    def _leftovers(self, sources: set[str]) -> None:
        """Report parts of quantized linears whose qweight is missing."""
        for name in self.by_name:
            owner, _, part = name.rpartition(".")
            if part in PARTS[1:] and owner not in sources:
                self.errors.append(f"tensor {owner}.qweight is missing, but {name} is there")

    def _packed(self, source: str) -> PackedInfo | None:
        target, pattern = self.conversion.target_of(f"{source}.weight")
        form = self.form.of(source)
        if f"{source}.weight" in self.by_name:
            self.errors.append(f"there are both {source}.weight and {source}.qweight")
            return None
        if form is None:
            place = self.form.dynamic.place(source)
            self._misfit(
                f"tensor {source}.qweight is there, but `dynamic` says that {source} is dense ({place})"
            )
            return None
        info = self._info(source, form, target, pattern)
        if info is not None:
            self._check_parts(info)
        return info

    def _info(
        self, source: str, form: PackedFormat, target: str | None, pattern: str | None
    ) -> PackedInfo | None:
        """Which linear of the model is packed under `source`; `target` and `pattern` are what the rules
        say."""
        place = self.names.place(source)
        fused: str | None = None
        sizes: tuple[int, int] | None
        if place is not None:
            name, fused = place.linear, place.target
            self._check_bias(source, place)
        elif target is None:
            self.errors.append(f"tensor {source}.qweight belongs to no module of {type(self.model).__name__}")
            return None
        elif pattern is not None:
            name, fused = source, target
        else:
            name = target.removesuffix(".weight")
        module = self.model.get_submodule(name) if pattern is None or place is not None else None
        if module is None:
            sizes = self._expert_sizes(source, form)
        elif is_linear(module):
            rows, columns = shape(module)
            sizes = columns, rows
        else:
            self.errors.append(f"tensor {source}.qweight belongs to {name}, which is not a linear")
            return None
        bias = f"{source}.bias" in self.by_name
        if getattr(module, "bias", None) is not None and not bias:
            self.errors.append(f"tensor {source}.bias is missing")
        if sizes is None:
            return None
        return PackedInfo(
            name=name,
            source_name=source,
            in_features=sizes[0],
            out_features=sizes[1],
            format=form,
            bias=bias,
            has_g_idx=f"{source}.g_idx" in self.by_name,
            transposed=isinstance(module, Conv1D),
            fused_into=fused,
        )

    def _check_bias(self, source: str, place: ExpertPlace) -> None:
        """Report a bias that is neither the linear's own nor in a tensor of all experts."""
        merged = place.bias_target
        if merged is None or f"{source}.bias" in self.by_name:
            return
        if all(self.conversion.target_of(name)[0] != merged for name in self.by_name if "bias" in name):
            self.errors.append(f"tensor {source}.bias is missing")

    def _expert_sizes(self, source: str, form: PackedFormat) -> tuple[int, int] | None:
        """(K, N), from its tensors, of an expert that has no module of its own."""
        qweight = self.by_name[f"{source}.qweight"]
        g_idx = self.by_name.get(f"{source}.g_idx")
        if len(qweight.shape) != 2:
            self.errors.append(f"tensor {source}.qweight has shape {list(qweight.shape)}; allowed: two sizes")
            return None
        columns = g_idx.shape[0] if g_idx and len(g_idx.shape) == 1 else qweight.shape[0] * 32 // form.bits
        return columns, qweight.shape[1]

    def _check_parts(self, info: PackedInfo) -> None:
        allowed: dict[str, tuple[str, ...]] = {
            "qweight": ("int32",),
            "qzeros": ("int32",),
            "scales": _SCALE_DTYPES,
            "g_idx": ("int32", "int64"),
        }
        for part, wanted in info.format.shapes(info.in_features, info.out_features).items():
            name = f"{info.source_name}.{part}"
            tensor = self.by_name.get(name)
            if tensor is None:
                if part != "g_idx":
                    self.errors.append(f"tensor {name} is missing")
                elif info.format.desc_act and info.groups > 1:
                    self.errors.append(f"tensor {name} is missing, and desc_act needs it")
                continue
            if tensor.dtype not in allowed[part]:
                self.errors.append(
                    f"tensor {name} has dtype {tensor.dtype}; allowed: {', '.join(allowed[part])}"
                )
            if tensor.shape != wanted:
                self._misfit(
                    f"tensor {name} has shape {list(tensor.shape)}; {info.format.bits} bits with group "
                    f"size {info.format.group_size} need {list(wanted)} for {info.in_features} inputs and "
                    f"{info.out_features} outputs"
                )
        if info.bias and self.by_name[f"{info.source_name}.bias"].shape != (info.out_features,):
            self.errors.append(
                f"tensor {info.source_name}.bias does not have {number_of(info.out_features, 'value')}"
            )

    def _dense(self, keys: KeyMap, sources: set[str]) -> None:
        state = self.model.state_dict()
        self.errors += [f"tensor {name} is missing" for name in keys.missing]
        for target in keys.origins:
            source = keys.source_of(target)
            if source is None or source not in self.by_name:
                continue
            found, wanted = self.by_name[source].shape, tuple(state[target].shape)
            if found != wanted and source.rpartition(".")[0] not in sources:
                self.errors.append(
                    f"tensor {source} has shape {list(found)}; config.json asks for {list(wanted)}"
                )
