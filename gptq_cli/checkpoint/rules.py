"""What makes a quantized checkpoint sound: one rule per defect, asked by `gptq load --verify`.

The rules see facts that `checkpoint.verify` gathers from headers and tensors. A rule's topic is the part of
the checkpoint that it is about (`PARTS`). Equal remarks about several tensors become one finding, so that
210 linears with negative scales are one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gptq_cli.checkpoint.format import WORDS, PackedFormat
from gptq_cli.checkpoint.tokenizer_facts import TokenizerFacts
from gptq_cli.model.source import SourceProblem
from gptq_cli.rules import Remark, rule

PARTS: tuple[tuple[str, str], ...] = (
    ("files", "headers, sizes, shard index, config, shapes and dtypes agree"),
    ("names", "every tensor has a place in the model"),
    ("coverage", "every linear in the blocks is quantized, or declared dense"),
    ("codes", "no qweight is blank"),
    ("zeros", "zeros follow the format's convention"),
    ("scales", "scales are finite, float16 and not 0"),
    ("g-idx", "g_idx is in range and in the order that desc_act says"),
    ("dense", "dense tensors are finite, and tied ones are one"),
)
"""(part of a checkpoint, what is checked there), in the order of the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderFacts:
    """What the g_idx of one linear says: the group of each input column."""

    lowest: int
    highest: int
    groups: int
    trivial: bool
    """Column k belongs to group k // group_size."""
    even: bool
    """Every group has as many columns as it would have in the trivial order."""
    of_columns: int | None = None
    """Column k belongs to group k // of_columns, which is not what the config says."""

    @property
    def in_range(self) -> bool:
        """Whether every group exists."""
        return self.lowest >= 0 and self.highest < self.groups

    @property
    def blank(self) -> bool:
        """All zeros where there are several groups: ExLlama's way to say that there is no order."""
        return self.in_range and self.highest == 0 and self.groups > 1

    @property
    def reorders(self) -> bool:
        """Whether columns are grouped in another order than their own."""
        return self.in_range and not self.blank and not self.trivial


@dataclass(frozen=True, slots=True, kw_only=True)
class ZerosFacts:
    """How the zeros of one linear are stored, see `checkpoint.zeros`."""

    stored: str
    """How they were found to be stored: "gptq", "gptq_v2" or "words"."""
    known: bool
    """False: the codes are symmetric, and no reading makes every zero the middle code."""
    any_zero: bool
    """Some zeros are 0, once read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFacts:
    """The values of one packed linear in a few numbers."""

    name: str
    format: PackedFormat
    scales_finite: bool
    scales_zero: bool
    """Some are 0; False where some are not finite."""
    scales_negative: bool
    """Some are negative; False where some are not finite."""
    scales_dtype: str
    """As safetensors and torch name it: "float16"."""
    codes_constant: bool
    """All words of qweight are equal."""
    order: OrderFacts | None
    """None without a g_idx."""
    zeros: ZerosFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFacts:
    """The output head."""

    name: str
    packed: bool
    declared: bool
    """The config says `lm_head` true."""
    tied: bool
    """The config says that it is the embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyCase:
    """A checkpoint: either why it cannot be opened, or what is in it."""

    path: str
    defects: tuple[str, ...] = ()
    """Why it cannot be opened."""
    defects_hint: str = ""
    notes: tuple[str, ...] = ()
    """What a person should know about how it is read."""
    has_config_copy: bool = True
    """There is a quantize_config.json beside config.json."""
    problems: tuple[SourceProblem, ...] = ()
    """What is wrong with the files beside the weights."""
    tokenizer: TokenizerFacts | None = None
    """None where it was not tried."""
    unexpected: tuple[str, ...] = ()
    """Tensors that have no place in the model and are not declared dense."""
    kept: tuple[str, ...] = ()
    """Tensors that have no place in the model, in modules that the config declares dense."""
    dense: tuple[tuple[str, bool], ...] = ()
    """(name, declared so in the config) of linears in the blocks that are not packed."""
    head: HeadFacts | None = None
    linears: tuple[LinearFacts, ...] = ()
    not_finite: tuple[str, ...] = ()
    """Dense tensors with NaN or infinite values."""
    untied: tuple[tuple[str, str], ...] = ()
    """(tensor, the tensor that the config ties it to) where the files hold different values."""


@rule("error", topics=("files",))
def unreadable(case: VerifyCase) -> Iterator[Remark]:
    """The checkpoint cannot be opened: files, config, shapes or dtypes contradict each other."""
    for defect in case.defects:
        yield Remark(subject=case.path, message=defect, hint=case.defects_hint)


@rule("note", topics=("files",))
def reading(case: VerifyCase) -> Iterator[Remark]:
    """The checkpoint is read in a way that its config does not say by itself."""
    for note in case.notes:
        yield Remark(subject=case.path, message=note)


@rule("note", topics=("files",))
def config_copy(case: VerifyCase) -> Iterator[Remark]:
    """There is no quantize_config.json, where older readers look for the settings."""
    if not case.has_config_copy:
        yield Remark(subject=case.path, message="there is no quantize_config.json")


@rule("error", "note", topics=("files",))
def tokenizer_broken(case: VerifyCase) -> Iterator[Remark]:
    """The tokenizer cannot be opened, or has no vocabulary: no reader can make tokens of a text.

    A note where it takes a package, or code of the model repository, that verification does without.
    """
    if case.tokenizer is None:
        return
    if case.tokenizer.fault:
        yield Remark(subject=case.path, message=case.tokenizer.fault, hint=case.tokenizer.hint)
    if case.tokenizer.unopened:
        message = f"the tokenizer was not tried: {case.tokenizer.unopened}"
        yield Remark(level="note", subject=case.path, message=message)


@rule("warning", topics=("files",))
def template_broken(case: VerifyCase) -> Iterator[Remark]:
    """Jinja cannot read a chat template: servers start, and refuse every conversation."""
    for name, why in case.tokenizer.templates if case.tokenizer is not None else ():
        yield Remark(subject=name, message=f"Jinja cannot read the template: {why}")


@rule("warning", topics=("files",))
def head_agrees(case: VerifyCase) -> Iterator[Remark]:
    """Config and files disagree about the output head: whether it is quantized, or a tensor of its own.

    vLLM, SGLang and GPTQModel go by `lm_head` in the config, and a head that is tied to the embedding is
    not read from the files at all.
    """
    head = case.head
    if head is None or (head.packed == head.declared and not (head.packed and head.tied)):
        return
    if head.declared and not head.packed:
        message, hint = "the config says lm_head true, but the files hold it dense", "set lm_head to false"
    elif not head.declared:
        message, hint = "it is quantized, but the config says lm_head false", "set lm_head to true"
    else:
        message = "it is quantized, but the config ties it to the embedding: readers that tie drop its codes"
        hint = "set tie_word_embeddings to false in config.json"
    yield Remark(subject=head.name, message=message, hint=hint)


@rule("warning", topics=("names",))
def leftover(case: VerifyCase) -> Iterator[Remark]:
    """The files hold a tensor that has no place in the model."""
    for name in case.unexpected:
        yield Remark(subject=name, message="the model has no place for the tensor")


@rule("note", topics=("names",))
def kept_for_others(case: VerifyCase) -> Iterator[Remark]:
    """The model's class has no place for a tensor that the config declares dense.

    Layers for multi-token prediction, for one: servers read them, Transformers does not.
    """
    for name in case.kept:
        yield Remark(subject=name, message="the tensor is kept for other readers: the class does not read it")


@rule("warning", "note", topics=("coverage",))
def coverage(case: VerifyCase) -> Iterator[Remark]:
    """A linear in a block is dense.

    A note where the config says so (`dynamic`, `modules_in_block_to_quantize`); else a warning, because
    readers look for packed tensors there.
    """
    for name, declared in case.dense:
        if declared:
            yield Remark(level="note", subject=name, message="the linear is dense, as the config says")
        else:
            message = "the linear is dense, which the config does not say: readers look for packed tensors"
            yield Remark(level="warning", subject=name, message=message)


@rule("warning", topics=("codes",))
def codes_constant(case: VerifyCase) -> Iterator[Remark]:
    """All words of a qweight are the same, as in a file that was allocated and never written."""
    for linear in case.linears:
        if linear.codes_constant:
            message = "all words of qweight are the same: the file may be blank"
            yield Remark(subject=linear.name, message=message)


@rule("error", topics=("zeros",))
def zeros_differ(case: VerifyCase) -> Iterator[Remark]:
    """Zeros differ from the middle code though the config says that codes are symmetric."""
    for linear in case.linears:
        if not linear.zeros.known:
            yield Remark(
                subject=linear.name,
                message="zeros differ from the middle code though sym is true",
                hint="set sym = false in the config: readers of symmetric codes do not look at the zeros",
            )


@rule("error", topics=("zeros",))
def zeros_convention(case: VerifyCase) -> Iterator[Remark]:
    """Symmetric zeros are stored in the convention of another checkpoint format.

    Format gptq stores zero - 1, gptq_v2 the zero itself. A reader that takes one for the other is a step off
    in every weight.
    """
    for linear in case.linears:
        form, stored = linear.format, linear.zeros.stored
        if not form.sym or not linear.zeros.known or stored == form.zeros:
            continue
        middle = 1 << (form.bits - 1)
        found, expected = (middle, middle - 1) if stored == "gptq_v2" else (middle - 1, middle)
        message = f"all stored zeros are {found}, but symmetric {form.checkpoint_format} has {expected}"
        if stored == WORDS:
            message = "zeros are stored as GPTQModel before 7.0 does it with 3 bits"
        yield Remark(
            subject=linear.name,
            message=message,
            hint="set checkpoint_format to what the zeros are: gptq stores zero - 1, gptq_v2 the zero",
        )


@rule("warning", topics=("zeros",))
def zeros_wrapped(case: VerifyCase) -> Iterator[Remark]:
    """Asymmetric zeros of 0 are stored as zero - 1, which wraps: readers disagree about what they are."""
    for linear in case.linears:
        form, stored = linear.format, linear.zeros.stored
        if form.sym or not linear.zeros.any_zero or stored not in (WORDS, "gptq"):
            continue
        top = (1 << form.bits) - 1
        message = f"some zeros are stored as {top}: read as 0 or as {top + 1}"
        if stored == WORDS:
            message = "some zeros are 0, subtracted from whole words: other readers go field by field"
        yield Remark(subject=linear.name, message=message)


@rule("error", topics=("scales",))
def scales_finite(case: VerifyCase) -> Iterator[Remark]:
    """Scales are NaN or infinite, so the weights of their groups are, too."""
    for linear in case.linears:
        if not linear.scales_finite:
            yield Remark(subject=linear.name, message="scales hold values that are not finite")


@rule("warning", topics=("scales",))
def scales_zero(case: VerifyCase) -> Iterator[Remark]:
    """Scales are 0, so all weights of their groups are 0."""
    for linear in case.linears:
        if linear.scales_zero:
            yield Remark(subject=linear.name, message="some scales are 0: all weights of their groups are 0")


@rule("note", topics=("scales",))
def scales_negative(case: VerifyCase) -> Iterator[Remark]:
    """Scales are negative, which every supported target reads."""
    for linear in case.linears:
        if linear.scales_negative:
            message = "some scales are negative, which every supported target reads"
            yield Remark(subject=linear.name, message=message)


@rule("warning", topics=("scales",))
def scales_dtype(case: VerifyCase) -> Iterator[Remark]:
    """Scales are stored in another type than float16, the one that every reader takes."""
    for linear in case.linears:
        if linear.scales_dtype != "float16":
            message = f"scales are stored as {linear.scales_dtype}"
            yield Remark(subject=linear.name, message=message, hint="float16 is what every reader takes")


@rule("error", topics=("g-idx",))
def g_idx_range(case: VerifyCase) -> Iterator[Remark]:
    """A column belongs to a group that does not exist."""
    for linear in case.linears:
        order = linear.order
        if order is not None and not order.in_range:
            worst = order.lowest if order.lowest < 0 else order.highest
            message = f"g_idx holds group {worst}; allowed: 0 to {order.groups - 1}"
            yield Remark(subject=linear.name, message=message)


@rule("note", topics=("g-idx",))
def g_idx_zero(case: VerifyCase) -> Iterator[Remark]:
    """All of g_idx is 0 though there are several groups, which is read as no order at all."""
    for linear in case.linears:
        if linear.order is not None and linear.order.blank:
            yield Remark(subject=linear.name, message="g_idx is all 0, which is read as no order at all")


@rule("warning", topics=("g-idx",))
def g_idx_order(case: VerifyCase) -> Iterator[Remark]:
    """g_idx orders the columns though the config says that there is no activation order, or has groups of
    another size.
    """
    for linear in case.linears:
        if linear.order is None or not linear.order.reorders:
            continue
        size = linear.format.group_size
        if (columns := linear.order.of_columns) is not None:
            yield Remark(
                subject=linear.name,
                message=f"g_idx has groups of {columns} columns, but group_size is {size}",
                hint="compare group_size in the quantization config with what it was published with",
            )
        elif not linear.format.desc_act:
            yield Remark(
                subject=linear.name,
                message="g_idx orders the columns though desc_act is false",
                hint="servers that skip g_idx compute something else: say desc_act = true in the config",
            )


@rule("warning", topics=("g-idx",))
def g_idx_uneven(case: VerifyCase) -> Iterator[Remark]:
    """g_idx gives the groups different numbers of columns, where an order of columns keeps them equal."""
    for linear in case.linears:
        order = linear.order
        if order is not None and order.reorders and not order.even and order.of_columns is None:
            message = "g_idx gives the groups different numbers of columns"
            yield Remark(subject=linear.name, message=message)


@rule("error", topics=("dense",))
def dense_finite(case: VerifyCase) -> Iterator[Remark]:
    """A dense tensor, such as a norm or the embedding, holds NaN or infinite values."""
    for name in case.not_finite:
        yield Remark(subject=name, message="the tensor holds values that are not finite")


@rule("warning", topics=("dense",))
def dense_tied(case: VerifyCase) -> Iterator[Remark]:
    """The config ties two tensors (embedding and head), but the files hold different values for them."""
    for name, first in case.untied:
        yield Remark(
            subject=name,
            message=f"the config ties it to {first}, but the files hold another tensor for it",
            hint="set tie_word_embeddings = false in config.json, or take the tensor out",
        )
