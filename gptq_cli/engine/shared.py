"""Weights that linears of several blocks share: quantized where they are used first.

Zamba runs one transformer at many places between its own blocks. Its linears are quantized in the first block
that holds them, from what enters them there; the blocks that follow are worked on with those weights, as a
reader of the checkpoint will run them. Their dense copies, which paired samples go through, have the dense
weights everywhere.

What a block has when its turn comes depends on where its weights come from: read from the files again they
are dense, resident in memory they are what was assigned last. So each later block is first given the dense
weights, where these would be lost, and then, after its dense copy was made, the quantized ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from gptq_cli.model.blocks import assign, weight_matrix
from gptq_cli.model.skeleton import LinearInfo

Places = Mapping[str, LinearInfo]
"""Linear, by its name in a block -> the linear of an earlier block whose weight it has."""


class SharedWeights:
    """The weights of linears that later blocks use again."""

    def __init__(
        self,
        blocks: Iterable[tuple[nn.Module, Places]],
        finished: Callable[[LinearInfo], Tensor],
        *,
        dense: bool,
    ) -> None:
        """`finished` gives the quantized weight (N, K) of a linear whose block an earlier run finished;
        `dense`: dense copies of blocks will be made."""
        self._finished = finished
        self._dense: dict[str, Tensor] = {}
        self._quantized: dict[str, Tensor] = {}
        self._uses: Counter[str] = Counter()
        for block, places in blocks:
            for name, info in places.items():
                self._uses[info.name] += 1
                weight = weight_matrix(block.get_submodule(name))
                if dense and not weight.is_meta:  # resident: assigning to it changes it everywhere
                    self._dense.setdefault(info.name, weight.to("cpu", copy=True))

    def make_dense(self, block: nn.Module, places: Places) -> None:
        """Before the dense copy of `block` is made."""
        for name, info in places.items():
            if info.name in self._dense:
                assign(block.get_submodule(name), self._dense[info.name])

    def make_quantized(self, block: nn.Module, places: Places) -> None:
        """After it was made."""
        for name, info in places.items():
            weight = self._quantized.get(info.name)
            assign(block.get_submodule(name), self._finished(info) if weight is None else weight)

    def leave(self, block: nn.Module, own: Places, places: Places) -> None:
        """The block is done: what of its `own` quantized linears later blocks use is kept, and what was used
        for the last time is not."""
        for name, info in own.items():
            if self._uses[info.name]:
                self._quantized[info.name] = weight_matrix(block.get_submodule(name)).to("cpu", copy=True)
        for info in places.values():
            self._uses[info.name] -= 1
            if not self._uses[info.name]:
                self._dense.pop(info.name, None)
                self._quantized.pop(info.name, None)


def nothing_shared() -> SharedWeights:
    """For blocks whose weights are their own."""

    def finished(info: LinearInfo) -> Tensor:
        raise KeyError(info.name)

    return SharedWeights((), finished, dense=False)
