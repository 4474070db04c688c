"""The values of dense tensors that are no bytes of the source's files: decoded, cut out, or computed.

What is stored in few bits is written decoded, the biases of experts are parts of larger tensors. And where
Transformers computes several tensors of the model from one of the files, or one from several, and only some
of them are packed, the others are stored as the model has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from gptq_cli.checkpoint.layout import PlannedTensor
from gptq_cli.model.conversion import Conversion
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.streamed import StreamedReader


def dense_values(
    skeleton: Skeleton, tensors: Iterable[PlannedTensor]
) -> Iterator[tuple[PlannedTensor, Tensor]]:
    """Each tensor with its values, in the source's dtype; those of one origin together, because they are
    computed together. Raises what `StreamedReader.get` raises."""
    files, origins = skeleton.files, skeleton.keys.origins
    computed: dict[int, list[PlannedTensor]] = {}
    with StreamedReader(files.directory, files.tensors, files.stamps) as reader:
        for tensor in tensors:
            assert tensor.source is not None
            if tensor.target:
                computed.setdefault(id(origins[tensor.target]), []).append(tensor)
                continue
            values = reader.get(tensor.source.name)
            yield tensor, values if tensor.cut is None else tensor.cut.of(values)
        conversion = Conversion(skeleton.model) if computed else None
        for together in computed.values():
            assert conversion is not None
            origin = origins[together[0].target]
            made = conversion.convert(origin, {name: reader.get(name) for name in origin.sources})
            for tensor in together:
                yield tensor, made.pop(tensor.target)
