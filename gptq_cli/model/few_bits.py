"""A source whose weights are stored in few bits, as the dense model that it decodes to.

Which tensors of the files belong together follows from their names and dtypes (`SPELLINGS`), how many scales
there must be from the config (`few_bits_config`). Both are compared here, from headers alone: what is left is
a list of dense tensors, as if the decoded model had been saved, and everything else (key conversion, plan,
engine, writer) works with that list. `StreamedReader` decodes when a tensor is read, one at a time.

Scales of activations and of key-value caches have no place in a dense model: they are dropped, and named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptq_cli.model.decoding import chunk_bytes
from gptq_cli.model.facts import (
    DECODED_DTYPE,
    DTYPE_BYTES,
    CodedTensor,
    CodeFormat,
    DecodedSource,
    TensorInfo,
)
from gptq_cli.model.few_bits_config import ALL, Layout, layouts_of, quantization_of
from gptq_cli.model.packed_codes import is_left_over, left_over, not_decoded
from gptq_cli.model.source import ModelFiles, SourceProblem
from gptq_cli.wording import number_of

_FP8 = ("float8_e4m3fn", "float8_e5m2")
_PAIRS = ("uint8", "int8", "float4_e2m1fn_x2")
_POWERS = ("float8_e8m0fnu", "uint8")
_FLOATS = ("float32", "bfloat16", "float16")
_FEW_BITS = frozenset({*_FP8, "float8_e8m0fnu", "float4_e2m1fn_x2"})
_CODES = (".weight", "_packed", "_blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How the tensors of one weight are named: its own name, without `stem`, and these endings."""

    format: CodeFormat
    stem: str = ""
    """An ending of the weight's name that its scale has not."""
    codes: str = ""
    code_dtypes: tuple[str, ...]
    scale: str
    scale_dtypes: tuple[str, ...]
    global_scale: str = ""
    divides: bool = False
    grouped: bool = False
    """True: the codes of a group are a dimension of their own, and the matrices are transposed."""


SPELLINGS = (
    *(
        Spelling(format="fp8", stem=stem, code_dtypes=_FP8, scale=scale, scale_dtypes=(*_FLOATS, *_POWERS))
        for stem, scale in (
            ("", "_scale_inv"),
            ("", "_scale"),
            ("", "_weight_scale"),
            (".weight", ".scale"),
            (".weight", ".qscale_weight"),
        )
    ),
    Spelling(
        format="mxfp4",
        codes="_blocks",
        code_dtypes=_PAIRS,
        scale="_scales",
        scale_dtypes=_POWERS,
        grouped=True,
    ),
    Spelling(format="mxfp4", codes="_packed", code_dtypes=_PAIRS, scale="_scale", scale_dtypes=_POWERS),
    Spelling(format="mxfp4", stem=".weight", code_dtypes=_PAIRS, scale=".scale", scale_dtypes=_POWERS),
    Spelling(
        format="nvfp4",
        codes="_packed",
        code_dtypes=_PAIRS,
        scale="_scale",
        scale_dtypes=("float8_e4m3fn",),
        global_scale="_global_scale",
        divides=True,
    ),
    Spelling(
        format="nvfp4",
        code_dtypes=_PAIRS,
        scale="_scale",
        scale_dtypes=("float8_e4m3fn",),
        global_scale="_scale_2",
    ),
)
"""The names that published checkpoints use, by format; the first that fits is taken."""
_DROPPED = (
    "input_scale",
    "input_scale_inv",
    "input_scale_ub",
    "input_global_scale",
    "activation_scale",
    "activation_scale_inv",
    "qscale_act",
    "output_scale",
    "q_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
)
_LEFT_SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale")
_DROPPED_ENDINGS = ("_weight_scale", "_weight_scale_2", "_input_scale", "_input_global_scale")
_NOT_UNDONE = ("pre_quant_scale", "weight_zero_point")
"""Endings of tensors that change what a code stands for, in a way that is not decoded here."""
_AGAIN = "fetch the model again, or give its bfloat16 release"


def decoded_files(files: ModelFiles, raw: Mapping[str, Any]) -> tuple[ModelFiles, str | None]:
    """`files` with the dense tensors that their weights in few bits decode to, and what is wrong with them
    as problems; beside it, why config.json (`raw`) describes a quantization that cannot be decoded, or None.

    Raises `ModelError` where a config is not one.
    """
    quantization = quantization_of(files.directory, raw)
    why = not_decoded(quantization, files.tensors)
    if why is not None:
        return files, why
    if quantization is None:
        return _with_problems(files, _unexplained(files.tensors)), None
    if is_left_over(quantization, files.tensors):
        return _with_problems(files, [left_over(files.source, quantization)]), None
    return _Matching(files.tensors, layouts_of(quantization)).applied_to(files), None


def _with_problems(files: ModelFiles, problems: Iterable[SourceProblem]) -> ModelFiles:
    return replace(files, problems=(*files.problems, *problems))


def _unexplained(tensors: Sequence[TensorInfo]) -> Iterator[SourceProblem]:
    """One problem for all tensors in few bits that no config explains."""
    found = [tensor for tensor in tensors if _in_few_bits(tensor)]
    if not found:
        return
    first = found[0]
    more = number_of(len(found) - 1, "more tensor", "is", "are")
    others = f", and {more} in few bits" if len(found) > 1 else ""
    yield SourceProblem(
        "unsupported-dtype",
        first.name,
        f"tensor {first.name} is {first.dtype}{others}, and config.json has no quantization_config that "
        "says how they are decoded",
        "put the quantization_config that the model was published with into config.json, or give its "
        "bfloat16 release",
    )


class _Matching:
    """The tensors of the files, sorted into weights, scales and the rest."""

    def __init__(self, tensors: Sequence[TensorInfo], layouts: Sequence[Layout]) -> None:
        self._tensors = tensors
        self._layouts = layouts
        self._by_name = {tensor.name: tensor for tensor in tensors}
        self._formats = {layout.format for layout in layouts}
        self.problems: list[SourceProblem] = []
        self.used: dict[Layout, None] = {}

    def applied_to(self, files: ModelFiles) -> ModelFiles:
        """`files` with the decoded tensors in place of codes and scales."""
        decoded: dict[str, TensorInfo] = {}
        claimed: set[str] = set()
        for tensor in self._tensors:
            if tensor.name in claimed:
                continue
            spelling = self._spelling_of(tensor)
            if spelling is None:
                continue
            parts = self._parts(tensor, spelling)
            claimed.update(part.name for part in parts)
            made = self._decoded(tensor, spelling, parts)
            if made is not None:
                decoded[tensor.name] = made
        dropped = [t.name for t in self._tensors if t.name not in claimed and _is_dropped(t)]
        left = {*claimed, *dropped}
        result = [decoded.get(t.name, t) for t in self._tensors if t.name in decoded or t.name not in left]
        self._check_rest(result)
        coded = [tensor for tensor in result if tensor.coded is not None]
        source = DecodedSource(
            formats=tuple(layout.words for layout in self.used),
            tensors=len(coded),
            elements=sum(math.prod(tensor.shape) for tensor in coded),
            dropped=tuple(dropped),
            working_bytes=max(map(_working_bytes, coded), default=0),
        )
        return replace(
            files,
            tensors=tuple(result),
            decoded=source if coded else None,
            problems=(*files.problems, *self.problems),
        )

    def _spelling_of(self, tensor: TensorInfo) -> Spelling | None:
        """How the weight whose codes `tensor` holds is spelled; None where it holds no codes.

        Where no scale is found under any of its names, that is a problem.
        """
        if self._is_scale(tensor):
            return None
        may_be = [
            s
            for s in SPELLINGS
            if tensor.dtype in s.code_dtypes
            and tensor.name.endswith(s.codes)
            and (not s.stem or tensor.name.endswith(s.stem + s.codes))
            and s.format in self._formats
        ]
        for spelling in may_be:
            scale, whole = self._scale_names(tensor, spelling)
            fits = scale in self._by_name and self._by_name[scale].dtype in spelling.scale_dtypes
            if fits and (not whole or whole in self._by_name):
                return spelling
        if may_be and len(tensor.shape) > 1:
            self._missing(tensor, may_be)
        return None

    def _is_scale(self, tensor: TensorInfo) -> bool:
        """Whether `tensor` is the scale of another: NVFP4's scales are in e4m3, MXFP4's in uint8."""
        for spelling in SPELLINGS:
            if tensor.dtype in spelling.scale_dtypes and tensor.name.endswith(spelling.scale):
                codes = tensor.name.removesuffix(spelling.scale) + spelling.stem + spelling.codes
                other = self._by_name.get(codes)
                if other is not None and other.dtype in spelling.code_dtypes:
                    return True
        return False

    def _scale_names(self, codes: TensorInfo, spelling: Spelling) -> tuple[str, str]:
        base = codes.name.removesuffix(spelling.codes)
        scale = base.removesuffix(spelling.stem) + spelling.scale
        return scale, base + spelling.global_scale if spelling.global_scale else ""

    def _parts(self, codes: TensorInfo, spelling: Spelling) -> tuple[TensorInfo, ...]:
        names = (codes.name, *(name for name in self._scale_names(codes, spelling) if name))
        return tuple(self._by_name[name] for name in names)

    def _missing(self, codes: TensorInfo, may_be: Sequence[Spelling]) -> None:
        for spelling in may_be:
            scale, whole = self._scale_names(codes, spelling)
            there = self._by_name.get(scale)
            if there is not None and there.dtype not in spelling.scale_dtypes:
                continue
            if there is not None and whole:
                self._add("missing-scale", codes.name, f"tensor {codes.name} has no {whole}")
                return
        names = list(dict.fromkeys(self._scale_names(codes, spelling)[0] for spelling in may_be))
        wrong = [self._by_name[name] for name in names if name in self._by_name]
        if wrong:
            allowed = sorted({dtype for spelling in may_be for dtype in spelling.scale_dtypes})
            self._add(
                "scale-mismatch",
                wrong[0].name,
                f"tensor {wrong[0].name} is {wrong[0].dtype}; allowed for the scales of {codes.name}: "
                f"{', '.join(allowed)}",
            )
            return
        self._add(
            "missing-scale",
            codes.name,
            f"tensor {codes.name} is {codes.dtype} and has no scale; looked for: {', '.join(names)}",
        )

    def _decoded(
        self, codes: TensorInfo, spelling: Spelling, parts: Sequence[TensorInfo]
    ) -> TensorInfo | None:
        """The dense tensor; None, and a problem, where the shapes of its parts do not fit each other."""
        if spelling.grouped:
            fits = len(codes.shape) == 4 and codes.shape[-1] * 2 == self._columns(spelling.format)
            shape = (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1] * 2) if fits else ()
        else:
            double = 2 if codes.dtype in _PAIRS and codes.dtype != "float4_e2m1fn_x2" else 1
            shape = (*codes.shape[:-1], codes.shape[-1] * double) if len(codes.shape) in (2, 3) else ()
        if not shape or 0 in shape:
            self._add(
                "scale-mismatch",
                codes.name,
                f"tensor {codes.name} has shape {list(codes.shape)}, which is not that of {spelling.format} "
                "weights",
            )
            return None
        layouts = [layout for layout in self._layouts if layout.format == spelling.format]
        scale, whole = parts[1], parts[2] if len(parts) > 2 else None
        layout = next((one for one in layouts if _fits(shape, one.block, scale.shape)), None)
        if layout is None:
            allowed = " or ".join(str(list(_grid(shape, one.block))) for one in layouts)
            self._add(
                "scale-mismatch",
                scale.name,
                f"tensor {scale.name} has shape {list(scale.shape)}; a weight {list(shape)} in "
                f"{' or '.join(one.words for one in layouts)} has {allowed}",
            )
            return None
        if whole is not None and (
            whole.dtype not in _FLOATS or math.prod(whole.shape) not in {1, math.prod(shape[:-2])}
        ):
            self._add(
                "scale-mismatch",
                whole.name,
                f"tensor {whole.name} is {whole.dtype} {list(whole.shape)}; allowed: one float",
            )
            return None
        self.used.setdefault(layout)
        if spelling.grouped:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return TensorInfo(
            name=codes.name.removesuffix(spelling.codes),
            shape=shape,
            dtype=DECODED_DTYPE,
            size_bytes=math.prod(shape) * DTYPE_BYTES[DECODED_DTYPE],
            shard=codes.shard,
            coded=CodedTensor(
                format=spelling.format,
                codes=codes,
                scale=scale,
                global_scale=whole,
                divides=spelling.divides,
                block=layout.block,
                transposed=spelling.grouped,
            ),
        )

    def _columns(self, form: CodeFormat) -> int:
        return next(layout.block[1] for layout in self._layouts if layout.format == form)

    def _check_rest(self, tensors: Sequence[TensorInfo]) -> None:
        """Problems for what is left undecoded: few bits of another format than the config names, and tensors
        that change what codes stand for."""
        known = {problem.subject for problem in self.problems}
        for tensor in tensors:
            if tensor.name.endswith(_NOT_UNDONE):
                self._add(
                    "unknown-scaling",
                    tensor.name,
                    f"tensor {tensor.name} changes what the codes beside it stand for, which is not decoded",
                )
            elif tensor.coded is None and _in_few_bits(tensor) and tensor.name not in known:
                words = " or ".join(layout.words for layout in self._layouts)
                self._add(
                    "unsupported-dtype",
                    tensor.name,
                    f"tensor {tensor.name} is {tensor.dtype}; the quantization_config explains {words}",
                )
        names = {tensor.name for tensor in tensors if tensor.coded is not None}
        twice = next((t.name for t in tensors if t.coded is None and t.name in names), None)
        if twice is not None:
            self._add("scale-mismatch", twice, f"tensor {twice} is there dense and in few bits")

    def _add(self, kind: str, subject: str, message: str) -> None:
        self.problems.append(SourceProblem(kind, subject, message, _AGAIN))


def _working_bytes(tensor: TensorInfo) -> int:
    """Memory that decoding it takes: its codes, its values, and what is widened on the way."""
    return tensor.stored_bytes + tensor.size_bytes + chunk_bytes(tensor.shape)


def _in_few_bits(tensor: TensorInfo) -> bool:
    return tensor.dtype in _FEW_BITS or (tensor.dtype in _PAIRS and tensor.name.endswith(_CODES))


def _is_dropped(tensor: TensorInfo) -> bool:
    """Whether a tensor has no use in a decoded model: a scale of activations, or one that was left beside a
    weight that is not in few bits."""
    last = tensor.name.rpartition(".")[2]
    return last in (*_LEFT_SCALES, *_DROPPED) or last.endswith(_DROPPED_ENDINGS)


def _grid(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    """How many scales a weight has: (…, N / rows, K / columns), rounded up."""
    *batch, n, k = shape
    rows, columns = block[0] or n, block[1] or k
    return (*batch, -(-n // rows), -(-k // columns))


def _fits(shape: Sequence[int], block: tuple[int, int], found: Sequence[int]) -> bool:
    """Whether scales of shape `found` are those of a weight; dimensions of size 1 do not count."""
    wanted = _grid(shape, block)
    whole = block == (ALL, ALL) and math.prod(found) == 1
    return whole or [size for size in found if size != 1] == [size for size in wanted if size != 1]
