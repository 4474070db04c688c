"""A model described by numbers, for rules, budgets and plans; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from gptq_cli.results.kept import KeptDense

DTYPE_BYTES = MappingProxyType(
    {
        "float64": 8,
        "int64": 8,
        "float32": 4,
        "int32": 4,
        "bfloat16": 2,
        "float16": 2,
        "int16": 2,
        "float8_e4m3fn": 1,
        "float8_e5m2": 1,
        "int8": 1,
        "uint8": 1,
        "bool": 1,
    }
)


def dtype_name(dtype: object) -> str:
    """`torch.bfloat16` -> `bfloat16`, as files and options call it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, as its shard's header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name: "bfloat16"."""
    size_bytes: int
    shard: str
    """File name of the shard."""


@dataclass(frozen=True, slots=True)
class TensorFact:
    """A parameter or a buffer of the skeleton; tied ones appear once, under their first name."""

    name: str
    elements: int
    size_bytes: int
    """In the dtype that the model will run in."""
    buffer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFact:
    """One linear that will be quantized: K = in_features, N = out_features."""

    name: str
    block: str
    in_features: int
    out_features: int
    stage: int = 0
    """Number of its stage inside the block, from 0."""
    routed: bool = False
    """It sees only some of the tokens (an expert); it is solved in an expert batch, see `engine.stages`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What rules, budgets and plans need to know about a model; made from a meta skeleton."""

    model: str
    architecture: str
    """Class name: "LlamaForCausalLM"."""
    dtype: str
    """The dtype of the weights while the model runs: "bfloat16"."""
    hidden_size: int
    vocab_size: int = 0
    max_positions: int | None = None
    blocks: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    """Every named module in registration order, without the root."""
    order: tuple[str, ...] = ()
    """Modules in the order in which a forward first calls them; () where it could not be traced."""
    untraced: str = ""
    """Where and why a forward without data stopped; "" where it completed."""
    tensors: tuple[TensorFact, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of parameter names that are one tensor."""
    linears: tuple[LinearFact, ...] = ()
    head: LinearFact | None = None
    """The output head where it is quantized; its `block` is ""."""
    by_module: tuple[LinearFact, ...] = ()
    """Linears that `--module` leaves dense."""
    kept: tuple[KeptDense, ...] = ()
    """Linears of the blocks that stay dense and why, folded."""
    dense_linears: tuple[str, ...] = ()
    """All of their names, unfolded."""
    fused: tuple[str, ...] = ()
    """Parameters of three dimensions inside blocks: experts fused into one tensor, left dense."""
    already_quantized: str | None = None
    """The `quant_method` that the config names."""
    tensor_files_bytes: int = 0
    """Bytes of the checkpoint on disk."""

    @property
    def packed(self) -> tuple[LinearFact, ...]:
        """Everything that is quantized: the linears of the blocks, and the head where it is."""
        return self.linears if self.head is None else (*self.linears, self.head)

    @property
    def head_is_tied(self) -> bool:
        """True where the quantized head is one tensor with the embedding in the source."""
        return self.head is not None and any(f"{self.head.name}.weight" in group for group in self.tied)

    @property
    def packed_weights(self) -> int:
        """Weights that are stored as codes."""
        return sum(linear.in_features * linear.out_features for linear in self.packed)

    @property
    def quantized_share(self) -> float:
        """Part of the parameters that is quantized; the weight of a tied head stays, as the embedding."""
        linears = self.linears if self.head_is_tied else self.packed
        return sum(x.in_features * x.out_features for x in linears) / max(1, self.parameters)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number in `dtype`."""
        return DTYPE_BYTES.get(self.dtype, 4)

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(tensor.elements for tensor in self.tensors if not tensor.buffer)

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters and buffers in the dtype the model runs in."""
        return sum(tensor.size_bytes for tensor in self.tensors)
