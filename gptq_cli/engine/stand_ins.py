"""What lies behind the blocks, run by the model's own forward, with every block replaced by a stand-in.

The last block's stand-in hands over hidden states that were computed before, the others what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gptq_cli.engine.calls import taken
from gptq_cli.engine.capture import replaced_forward
from gptq_cli.model.flow import BlockShape, Flow


@contextmanager
def behind_blocks(blocks: Sequence[nn.Module], flow: Flow, hidden: Tensor) -> Iterator[None]:
    """Inside the `with`, a forward of the model goes on with `hidden` behind its last block."""
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            given = hidden if index == len(blocks) - 1 else None
            stack.enter_context(replaced_forward(block, _stand_in(given, flow.shapes[flow.blocks[index]])))
        yield


def _stand_in(given: Tensor | None, shape: BlockShape) -> Callable[..., Any]:
    """A block's forward that hands over `given`, or what it is given itself."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = taken(args, kwargs, shape.carrier)[0] if given is None else given
        return hidden if shape.results is None else (hidden, *[None] * (shape.results - 1))

    return forward
