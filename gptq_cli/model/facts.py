"""A model described by numbers, for rules, budgets and plans; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from gptq_cli.results.kept import KeptDense

Split = Literal["column", "row", "whole"]
"""What tensor parallelism divides: the outputs of a linear, its inputs, or nothing."""

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

CodeFormat = Literal["fp8", "mxfp4", "nvfp4"]
"""How weights are stored: 8 bits with scales of any layout, 4 bits with a scale for each 32 (MX) or 16 (NV)
columns."""
DECODED_DTYPE = "bfloat16"
"""What weights in few bits become while they are read."""


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
    coded: CodedTensor | None = None
    """How it is stored where that is in few bits: dtype, shape and bytes above are then those of its decoded
    form, and `shard` that of its codes."""

    @property
    def stored_bytes(self) -> int:
        """Bytes in the files, scales included."""
        return self.size_bytes if self.coded is None else sum(part.size_bytes for part in self.coded.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedTensor:
    """The tensors of the files that one weight in few bits is decoded from; the maths is in `decoding`."""

    format: CodeFormat
    codes: TensorInfo
    scale: TensorInfo
    global_scale: TensorInfo | None = None
    """NVFP4: one number for the whole tensor."""
    divides: bool = False
    """True: values are divided by the global scale, not multiplied."""
    block: tuple[int, int]
    """Rows and columns that share a scale; 0 stands for all of them."""
    transposed: bool = False
    """True: the codes are those of the transposed matrices."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Its tensors in the files."""
        parts = (self.codes, self.scale)
        return parts if self.global_scale is None else (*parts, self.global_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedSource:
    """What is decoded of a model that is stored in few bits."""

    formats: tuple[str, ...]
    """In words: "fp8, a scale per 128 x 128"."""
    tensors: int
    elements: int
    dropped: tuple[str, ...] = ()
    """Tensors of the files without a place in a decoded model: scales of activations, of key-value caches."""
    working_bytes: int = 0
    """Memory that decoding the largest tensor takes, its codes and its values included."""

    @property
    def words(self) -> str:
        """`fp8, a scale per 128 x 128, decoded to bfloat16 while read`."""
        return f"{' and '.join(self.formats)}, decoded to {DECODED_DTYPE} while read"


def can_be_packed(in_features: int, out_features: int, bits: int, group_size: int) -> bool:
    """Whether the codes and zeros of a linear fill whole words, and its columns whole groups."""
    words = in_features * bits % 32 == 0 and out_features * bits % 32 == 0
    return words and (group_size == -1 or in_features % group_size == 0)


@dataclass(frozen=True, slots=True)
class TensorFact:
    """A parameter or a buffer of the skeleton; tied ones appear once, under their first name."""

    name: str
    elements: int
    size_bytes: int
    """In the dtype that the model will run in."""
    buffer: bool = False


@dataclass(frozen=True, slots=True)
class HeadCounts:
    """Heads that tensor parallelism deals out; 0: the model has none of the kind."""

    queries: int = 0
    keys: int = 0
    """Key-value heads. Where there are fewer than ranks, ranks share one."""
    others: tuple[tuple[str, int], ...] = ()
    """(what they are called, number): of linear attention."""


NO_HEADS = HeadCounts()


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
    split: Split = "whole"
    part_of: str = ""
    """The tensor of all experts that holds its weight; "" where it has a weight of its own."""
    source_name: str = ""
    """Its name in the files."""
    interleaved: bool = False
    """Its rows alternate with those of another linear in the tensor `part_of`."""
    together: bool = False
    """Its forward holds as many rows for each expert as there are tokens, whatever the routing."""

    @property
    def fused_with(self) -> tuple[str, str]:
        """Equal for linears that a server loads as one matrix: a stage's under one parent; all experts of a
        block."""
        if self.routed:
            return self.block, "experts"
        return self.name.rpartition(".")[0], str(self.stage)


@dataclass(frozen=True, slots=True)
class StackFact:
    """A parameter of three dimensions that stays dense."""

    name: str
    reason: str
    """Why it cannot be quantized matrix by matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideFact:
    """A part of the model beside its text decoder, which is copied as a whole: see `model.beside`."""

    name: str
    parameters: int
    in_class: bool
    """False: in the files alone, such as layers for multi-token prediction."""
    surplus: bool = False
    """A block like those of the model, in the files alone: config.json says fewer than there are."""


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
    between: str = ""
    """Why the model's own forward has to run between the blocks; "" where it has not."""
    obstacle: str = ""
    """Why the blocks cannot be worked on one after another; "" where they can."""
    tensors: tuple[TensorFact, ...] = ()
    uncalled: frozenset[str] = frozenset()
    """Tensors outside the blocks that quantizing does not compute with: they stay in the files."""
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of parameter names that are one tensor."""
    linears: tuple[LinearFact, ...] = ()
    head: LinearFact | None = None
    """The output head where it is quantized; its `block` is ""."""
    by_module: tuple[LinearFact, ...] = ()
    """Linears that `--module` leaves dense."""
    kept: tuple[KeptDense, ...] = ()
    """Linears of the blocks that stay dense and why, folded."""
    routed_share: float = 1.0
    """The part of the tokens that an expert sees on average, as the top-k of the routers says; 1 where it
    is not known."""
    fused: tuple[StackFact, ...] = ()
    """Parameters of three dimensions inside blocks that stay dense."""
    shared: tuple[str, ...] = ()
    """Linears of the blocks whose weight is that of a quantized one."""
    dense_linears: tuple[str, ...] = ()
    """Linears of the blocks that stay dense, by their names."""
    listed: bool = False
    """The checkpoint lists the quantized ones in `modules_in_block_to_quantize`."""
    heads: HeadCounts = NO_HEADS
    score_heads: int = 0
    """Heads whose attention scores are a tensor, token by token, before they are applied; 0 where an operator
    does both at once."""
    scores_kept: int = 0
    """Tensors of scores that a forward holds which waits between two stages, each of `score_heads` heads."""
    already_quantized: str | None = None
    """The `quant_method` that the config names, where its weights cannot be decoded."""
    decoded: DecodedSource | None = None
    """Present where the weights are stored in few bits and are decoded while they are read."""
    tensor_files_bytes: int = 0
    """Bytes of the checkpoint on disk."""
    beside: tuple[BesideFact, ...] = ()

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
        """Number of parameters of the files; tied ones count once."""
        left_out = sum(part.parameters for part in self.beside if not part.in_class)
        return left_out + sum(tensor.elements for tensor in self.tensors if not tensor.buffer)

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters and buffers in the dtype the model runs in."""
        return sum(tensor.size_bytes for tensor in self.tensors)
