"""Quantize a Hugging Face causal language model to a GPTQ checkpoint that real servers load.

The package has six floors, and imports only go down. docs/architecture.md has the floors, the road of the
data and a list of all modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptq_cli.placement.device_map import DeviceMap

__version__ = "0.1.0"


def load(path: str, device_map: str | dict[str, Any] | DeviceMap | None = None, dtype: str = "auto") -> Any:
    """Open the GPTQ checkpoint `path`: a Transformers model on packed weights, ready for `generate`.

    `device_map` takes every form of `--device-map`; None: the current accelerator, or the CPU. Its
    `save_pretrained` copies the checkpoint. What was read otherwise than the config says is logged as a
    warning of the logger `gptq_cli`. Raises `CheckpointError` naming the tensor that is wrong,
    `PreflightRefused` when the map is not legal.
    """
    import logging

    from gptq_cli.config import LoadJob
    from gptq_cli.events import Event, Warned
    from gptq_cli.jobs import open_model
    from gptq_cli.placement.device_map import DeviceMap

    def log(event: Event) -> None:
        if isinstance(event, Warned):
            logging.getLogger(__name__).warning(event.message)

    wanted = None if device_map is None else DeviceMap.parse(device_map)
    job = LoadJob(path=path, device_map=wanted, dtype=dtype)  # type: ignore[arg-type]  # judged there
    return open_model(job, log)
