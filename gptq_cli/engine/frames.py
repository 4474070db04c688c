"""One micro-batch's forward in a thread of its own, and the hooks that park it where a stage begins.

The hooks also prove, for every micro-batch, what the traced sample promised: that the linears of a stage read
the same tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptq_cli.devices.accelerators import working_on
from gptq_cli.engine.calls import BlockCall
from gptq_cli.engine.pausing_forward import PausingForward
from gptq_cli.engine.residuals import BLOCK_INPUT, Source
from gptq_cli.engine.stages import Stage
from gptq_cli.errors import GptqError
from gptq_cli.model.reads import Read

DATA_DEPENDENT = (
    "which linears share an input depends on the data here; report it with the model's config.json"
)


def residuals_of_frame() -> dict[Source, Tensor] | None:
    frame = threading.current_thread()
    return frame.beside if isinstance(frame, Frame) else None


def leader_hook(stage: Stage) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Parks the frame that comes to `stage`; a forward outside any frame passes."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        frame = threading.current_thread()
        if isinstance(frame, Frame):
            frame.park(stage, args[0])

    return hook


def follower_hook(leader: str, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Proves for every micro-batch what the traced sample promised: `name` reads what `leader` read."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        frame = threading.current_thread()
        if isinstance(frame, Frame):
            frame.sharing.follow(leader, name, args[0])

    return hook


def sharing_hook(stage: Stage, name: str, sharing: Sharing) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """The same for a forward that runs to its end in one go: the leader comes first and notes its input."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if name == stage.leader:
            sharing.lead(stage, args[0])
        else:
            sharing.follow(stage.leader, name, args[0])

    return hook


class Sharing:
    """Proves for one forward that the linears of a stage read one tensor.

    What a leader read is held until the last of its followers has read it, which is as long as the block's
    own forward needs it: an address alone would be given to another tensor as soon as this one is gone.
    """

    def __init__(self) -> None:
        self._read: dict[str, Read] = {}
        self._missing: dict[str, set[str]] = {}

    def lead(self, stage: Stage, x: Tensor) -> None:
        """The leader of `stage` reads `x`. Raises `GptqError` if a follower left out what it read before."""
        for missing in self._missing.get(stage.leader, ()):
            raise sharing_error(stage.leader, missing)
        followers = set(stage.linears[1:])
        if followers:
            self._read[stage.leader], self._missing[stage.leader] = Read.of(x), followers

    def follow(self, leader: str, name: str, x: Tensor) -> None:
        """`name` reads `x`. Raises `GptqError` unless that is what `leader` read before it."""
        read = self._read.get(leader)
        if read is None or not read.same(Read.of(x)):
            raise sharing_error(leader, name)
        self._missing[leader].discard(name)
        if not self._missing[leader]:
            del self._read[leader], self._missing[leader]

    def end(self) -> None:
        """The forward is over. Raises `GptqError` when a linear of a stage never ran."""
        for leader, missing in self._missing.items():
            raise sharing_error(leader, min(missing))


def sharing_error(leader: str, name: str) -> GptqError:
    return GptqError(
        f"{name!r} and {leader!r} shared their input for the traced sample but not for a later one",
        hint=DATA_DEPENDENT,
    )


class Frame(PausingForward):
    """One micro-batch's forward of a block, which parks where a stage begins."""

    def __init__(
        self, block: nn.Module, call: BlockCall, hidden: list[Tensor], *, keeps_input: bool = False
    ) -> None:
        super().__init__("gptq-forward")
        self.parked_at: str | None = None
        self.parked_input: Tensor | None = None
        """What the stage reads where it is parked; the forward itself holds it as long."""
        self.sharing = Sharing()
        self.beside: dict[Source, Tensor] = {}
        """Residuals, by where they were found, until the stage that needs them takes them."""
        self._keeps_input = keeps_input
        self._block = block
        self._call = call
        self._hidden: list[Tensor] = hidden
        self._output: Any = None

    # -- the engine's side

    def advance(self) -> Tensor | None:
        """Let the forward run to its next park; that stage's input, or None when it came to its end."""
        self.parked_input = None
        self.resume()
        return self.parked_input

    def take_output(self) -> Any:
        """What the block returned, once."""
        output, self._output = self._output, None
        if output is None:
            raise GptqError("a forward ended without an output")
        return output

    # -- the forward's side

    def forward(self) -> None:
        try:
            entering = self._hidden.pop(0)
            if self._keeps_input:
                self.beside[BLOCK_INPUT] = entering
            with working_on(entering.device), torch.no_grad():
                self._output = self._call(self._block, entering)
            self.sharing.end()
        finally:
            self.parked_at = None

    def park(self, stage: Stage, x: Tensor) -> None:
        """Hand `x` to the engine and wait until the stage is quantized."""
        self.parked_at = stage.leader
        self.parked_input = x
        self.sharing.lead(stage, x)
        del x
        self.pause()
