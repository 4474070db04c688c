"""The readers of checkpoints that a person can name, and on how many GPUs they would divide a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from gptq_cli.errors import ConfigError
from gptq_cli.fields import check_choice, check_int

Target = Literal["vllm", "sglang", "transformers", "exllamav2", "gptqmodel"]
"""Readers of GPTQ checkpoints whose rules are known."""
SERVERS: tuple[Target, ...] = ("vllm", "sglang")
"""Those that divide a model over several GPUs by tensor parallelism."""
MAX_RANKS = 64
"""The most GPUs of tensor parallelism that are looked at."""


def parse_targets(names: Collection[str], tp: int = 1) -> tuple[Target, ...]:
    """The readers called `names`, each once; with `tp` and no name, all that divide a model over GPUs.

    Raises `ConfigError`.
    """
    for name in names:
        check_choice("target", name, get_args(Target))
    check_int("tp", tp, 1, "use --tp 2, the number of GPUs that share the model", maximum=MAX_RANKS)
    if tp > 1 and not names:
        return SERVERS
    if tp > 1 and not set(names) & set(SERVERS):
        raise ConfigError(
            f"tp is {tp}, which is about {' and '.join(SERVERS)}, but target is {', '.join(names)}",
            hint=f"add --target {SERVERS[0]}, or leave --tp out",
        )
    return tuple(dict.fromkeys(names))  # type: ignore[arg-type]  # checked above
