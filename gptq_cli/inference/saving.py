"""The methods of a loaded model that Transformers' own versions would get wrong for packed linears.

A loaded model has its architecture's class. That class's `save_pretrained` would write the private layout of
our kernels without a quantization config, a checkpoint that opens with random weights; its `num_parameters`
would not count packed weights. `Opened` is a mixin placed before the class that overrides both.

A model is saved by copying the files it was loaded from: they hold its original tensors and configs, and
every reader can open them. Changes made since, in the files or in the model, cannot be saved this way, and
raise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gptq_cli.checkpoint.checkpoint import QuantizedCheckpoint
from gptq_cli.checkpoint.copying import CheckpointFiles
from gptq_cli.errors import CheckpointError, ConfigError, DeviceMapError
from gptq_cli.inference.gptqmodel_linear import GptqmodelLinear
from gptq_cli.inference.packed_linear import PackedLinear
from gptq_cli.placement.device import format_size, parse_size
from gptq_cli.wording import and_others

_UNLIMITED = "50GB"
"""Transformers' default of max_shard_size, which means: not given."""
_AS_IT_IS = "a quantized model is saved as the files that it was loaded from"
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "state_dict": (None,),
    "push_to_hub": (False,),
    "variant": (None,),
    "safe_serialization": (True, None),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
    "save_peft_format": (True, False),
    "token": (None,),
}
"""Option of `save_pretrained` -> values that ask for nothing beyond the checkpoint."""


class Opened:
    """The mixin before the class of a loaded model."""

    _checkpoint_files: CheckpointFiles
    _checkpoint_writes: Mapping[str, tuple[int, int]]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        max_shard_size: int | str = _UNLIMITED,
        **options: Any,
    ) -> None:
        """Write the checkpoint that the model was loaded from: its tensors, configs and tokenizer.

        The directory is created if it does not exist; files of the same names are replaced. Changes to
        `model.config` or `model.generation_config` are not saved. Raises `ConfigError` for an option that is
        not supported and for a directory that holds other weights, and `CheckpointError` where the model or
        its files were changed since it was loaded.
        """
        directory = self._checkpoint_files.directory
        for name, value in options.items():
            if not any(value is harmless for harmless in _HARMLESS.get(name, ())):
                raise ConfigError(
                    f"{name} is {_shown(value)}, but {_AS_IT_IS}; allowed: "
                    f"{', '.join(map(repr, _HARMLESS.get(name, ()))) or 'nothing'}",
                    hint=_uploaded(directory, str(options.get("repo_id", "REPO")))
                    if name == "push_to_hub"
                    else f"leave {name} out, or copy {directory} yourself",
                )
        _check_shards(self._checkpoint_files, max_shard_size)
        _check_unchanged(self, self._checkpoint_writes)
        if is_main_process:
            self._checkpoint_files.copy_to(Path(save_directory).expanduser())

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Not supported: raises a `ConfigError` that names the command which uploads the files."""
        raise ConfigError(
            "a quantized model is not uploaded from memory: upload its files instead",
            hint=_uploaded(self._checkpoint_files.directory, repo_id),
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As in Transformers; a packed linear counts as the dense one that it replaces.

        Codes cannot be trained: `only_trainable` leaves them out.
        """
        dense = int(super().num_parameters(only_trainable, exclude_embeddings))  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        kinds = (PackedLinear, GptqmodelLinear)
        packed = sum(module.parameters_packed for module in self.modules() if isinstance(module, kinds))
        return dense if only_trainable else dense + packed


def answer_for(model: Any, checkpoint: QuantizedCheckpoint) -> None:
    """Put `Opened` before the class of `model`, which was filled from `checkpoint` and is on its devices."""
    kind = type(model)
    model._checkpoint_files = CheckpointFiles.of(checkpoint)
    model._checkpoint_writes = dict(_writes(model))
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    model.__class__ = type(kind.__name__, (Opened, kind), names)


def _writes(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """(parameter, (its identity, its write counter)); parameters that hooks move between devices are left
    out, because each move makes a new one."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            yield name, (id(parameter), 0 if parameter.is_inference() else parameter._version)


def _check_unchanged(model: Any, before: Mapping[str, tuple[int, int]]) -> None:
    now = dict(_writes(model))
    names = {name for name, _ in model.named_parameters()}
    changed = [name for name, state in before.items() if name not in names or now.get(name, state) != state]
    changed += [name for name in now if name not in before]
    if changed:
        raise CheckpointError(
            f"{changed[0]}{and_others(changed)} was changed after the model was loaded, but {_AS_IT_IS}",
            hint="quantize the changed model; save adapters separately",
        )


def _check_shards(files: CheckpointFiles, limit: int | str) -> None:
    try:
        allowed = parse_size(limit)
    except DeviceMapError as error:
        raise ConfigError(f"max_shard_size: {error.message}", hint=error.hint) from error
    if limit != _UNLIMITED and files.largest_bytes > allowed:
        raise ConfigError(
            f"max_shard_size is {limit}, but {_AS_IT_IS}, and the largest shard has "
            f"{format_size(files.largest_bytes)}",
            hint="leave max_shard_size out, or quantize again with --max-shard-size",
        )


def _uploaded(directory: Path, repo_id: str) -> str:
    return f"upload them: hf upload {repo_id} {directory}"


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, bool | int | str | None) else type(value).__name__
