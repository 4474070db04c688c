"""What a launcher (torchrun, `accelerate launch`) says in the environment: which of how many processes this
is. Without one there is no launch, and one process does all the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptq_cli.errors import ConfigError

_HINT = "start it as: torchrun --nproc-per-node 2 -m gptq_cli quantize MODEL --out DIR"
_STARTERS = {
    "SLURM_STEP_NUM_TASKS": ("SLURM_PROCID", "srun --ntasks-per-node 1"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "mpirun --map-by ppr:1:node"),
    "PMI_SIZE": ("PMI_RANK", "mpirun -ppn 1"),
}
"""What starts processes without a word on where they meet: how many, this one's number, and the line that
starts one on each machine."""


def place_of(environ: Mapping[str, str]) -> int:
    """The number of this process among those that were started together, as far as that can be read; 0 where
    it is the only one."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        size, rank = environ["WORLD_SIZE"], environ["RANK"]
        return int(rank) if size != "1" and rank.isdecimal() else 0
    name = _started_by(environ)
    rank = environ.get(_STARTERS[name][0], "0") if name else "0"
    return int(rank) if rank.isdecimal() else 0


def _started_by(environ: Mapping[str, str]) -> str | None:
    """The variable in which something other than a launcher says that it started several processes."""
    found = (name for name in _STARTERS if environ.get(name, "1").isdecimal())
    return next((name for name in found if int(environ.get(name, "1")) > 1), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """This process among those that were started together."""

    rank: int
    size: int
    """So many processes, on all machines."""
    local_rank: int
    """Its number on its machine: that of its accelerator."""
    local_size: int
    """So many processes on its machine."""
    host: str
    port: int
    """Where they meet."""
    launcher_has_store: bool = False
    """The launcher keeps the store in which they meet, so that it outlives every rank."""

    @property
    def leads(self) -> bool:
        """The first one talks, writes and decides."""
        return self.rank == 0

    @property
    def speaks_for_its_machine(self) -> bool:
        """The one that says on its machine that the first one is gone."""
        return self.rank == 1 or (self.local_rank == 0 and not self.leads)

    @property
    def command(self) -> tuple[str, ...]:
        """How such processes are started, in front of `quantize …`."""
        machines = -(-self.size // self.local_size)
        nodes = ("--nnodes", str(machines)) if machines > 1 else ()
        return ("torchrun", *nodes, "--nproc-per-node", str(self.local_size), "-m", "gptq_cli")

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Launch | None:
        """The launch that the environment describes; None without one.

        A scheduler may set some of these names for purposes of its own: what counts is RANK and WORLD_SIZE.
        Raises `ConfigError` where they are there and do not fit, and where a scheduler started several
        processes without them: each would do all the work.
        """
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            if (name := _started_by(environ)) is not None:
                raise _not_a_launcher(name, environ[name])
            return None
        rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
            if size == 1:
                return None
            raise ConfigError(
                f"WORLD_SIZE={size} says that several processes work together, but MASTER_ADDR or "
                "MASTER_PORT is not set, which say where they meet",
                hint=f"{_HINT}; or unset RANK and WORLD_SIZE",
            )
        local_rank = _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else rank
        local_size = _number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else size
        if not 0 <= rank < size or not 0 <= local_rank < local_size:
            raise ConfigError(
                f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE="
                f"{local_size}: a rank is a number below the size",
                hint=_HINT,
            )
        return cls(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            host=environ["MASTER_ADDR"],
            port=_number(environ, "MASTER_PORT"),
            launcher_has_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


def _not_a_launcher(name: str, size: str) -> ConfigError:
    return ConfigError(
        f"{name}={size} says that so many processes were started, but RANK and WORLD_SIZE are not set, by "
        "which they would work together: each would do all the work, and write the same files",
        hint="start one launcher on each machine, which starts the rest: "
        f"{_STARTERS[name][1]} torchrun --nnodes … --nproc-per-node … -m gptq_cli quantize …; for a single "
        f"process, unset {name}",
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(
            f"{name} is {environ[name]!r}; a launcher sets a whole number", hint=_HINT
        ) from None
