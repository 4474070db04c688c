"""16-bit matmuls in fp32: which are, which are not, and that the result is rounded once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_cli.devices import fp32_matmul as products
from gptq_cli.devices.fp32_matmul import Fp32Matmul, matmul_scope
from gptq_cli.gptq import matmul as precision
from gptq_cli.gptq.matmul import fast_matmul_supported
from tests.tiny import VOCAB, tiny_model

DTYPES = (torch.bfloat16, torch.float16)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


MULTIPLY_ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: nn.functional.linear(x, w.T.contiguous()),
    "matmul": torch.matmul,
    "operator": lambda x, w: x @ w,
    "mm": torch.mm,
    "method": lambda x, w: x.mm(w),
    "addmm": lambda x, w: torch.addmm(w[0], x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w[None])[0],
    "baddbmm": lambda x, w: w.new_zeros(1, 1, 1).baddbmm(x[None], w[None], beta=0, alpha=0.5)[0],
    "einsum": lambda x, w: torch.einsum("tk,kn->tn", x, w),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_a_matmul_is_the_fp32_one_rounded_once(name: str, dtype: torch.dtype) -> None:
    x, w = normal(40, 64, dtype=dtype), normal(64, 24, dtype=dtype)
    product = MULTIPLY_ADDS[name]
    with Fp32Matmul():
        ours = product(x, w)
    assert ours.dtype == dtype
    assert torch.equal(ours, product(x.float(), w.float()).to(dtype))


def test_a_tall_linear_is_taken_in_pieces() -> None:
    x, w, bias = normal(3, 700, 64).bfloat16(), normal(24, 64).bfloat16(), normal(24).bfloat16()
    with Fp32Matmul():
        ours = nn.functional.linear(x, w, bias)
    exact = nn.functional.linear(x.float(), w.float(), bias.float())
    torch.testing.assert_close(ours, exact.bfloat16(), rtol=2**-7, atol=2**-10)
    assert ours.shape == (3, 700, 24)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_linear_are_fp32_sums_rounded_once(
    dtype: torch.dtype, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_rows_of", lambda weight: products._pieces(len(weight), 5))
    operands = {"x": normal(3, 700, 64), "weight": normal(24, 64), "bias": normal(24)}
    towards = normal(3, 700, 24, dtype=dtype)

    def found(scope: AbstractContextManager[object], number: torch.dtype) -> list[Tensor | None]:
        leaves = {
            name: x.to(dtype).to(number, copy=True).requires_grad_(wanted in (name, "all"))
            for name, x in operands.items()
        }
        with scope:
            out = nn.functional.linear(leaves["x"], leaves["weight"], leaves["bias"])
        out.backward(towards.to(number))
        return [out.detach(), *(x.grad for x in leaves.values())]

    ours, exact = found(Fp32Matmul(), dtype), found(nullcontext(), torch.float64)
    step = torch.finfo(dtype).eps / 2  # of one rounding; beside it, fp32 sums of up to 2100 products
    assert [x is not None for x in exact[1:]] == [wanted in (name, "all") for name in operands]
    for one, other in zip(ours, exact, strict=True):
        assert (one is None) is (other is None)
        if one is not None and other is not None:
            assert one.dtype == dtype
            assert bool(((one - other).abs() <= 1.01 * step * other.abs() + 2e-5).all())


def test_a_weight_is_taken_in_pieces_of_many_rows() -> None:
    def rows(*shape: int) -> list[int]:
        weight = torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        return [len(weight[own]) for own in products._rows_of(weight)]

    assert rows(5000, 640) == [1638, 1638, 1638, 86]
    assert rows(1100, 14336) == [512, 512, 76]  # not 73: x is widened again for every piece
    assert rows(1536, 576) == [1536]


@pytest.mark.parametrize("shape", [(1,), (1, 1300), (1300,)])
def test_a_bias_may_be_spread_over_the_outputs(shape: tuple[int, ...]) -> None:
    x, w, bias = normal(40, 1024).bfloat16(), normal(1300, 1024).bfloat16(), normal(*shape).bfloat16()
    assert len(list(products._rows_of(w))) == 2
    with Fp32Matmul():
        ours = nn.functional.linear(x, w, bias)
    exact = x.double() @ w.double().T + bias.double()
    assert bool(((ours - exact).abs() <= 1.01 * 2**-8 * exact.abs() + 1e-4).all())


def test_linears_of_other_shapes_are_as_without() -> None:
    x, vector = normal(40, 64).bfloat16(), normal(64).bfloat16()
    with Fp32Matmul():
        assert nn.functional.linear(x, vector).shape == (40,)
        assert nn.functional.linear(x[:, :0], x[:8, :0]).eq(0).all()
        assert nn.functional.linear(x[:0], x[:8]).shape == (0, 8)


@pytest.mark.parametrize(("x_too", "weight_too"), [(True, False), (True, True), (False, True)])
def test_a_linear_keeps_its_operands_as_they_are(x_too: bool, weight_too: bool) -> None:
    x, w = normal(600, 64).bfloat16().requires_grad_(x_too), normal(24, 64).bfloat16()
    w.requires_grad_(weight_too)
    kept: list[int] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.data_ptr())
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), Fp32Matmul():
        nn.functional.linear(x, w)
    assert kept == [x.data_ptr()] * weight_too + [w.data_ptr()] * x_too


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_the_units_do_to_within_the_order_of_summation(dtype: torch.dtype) -> None:
    x, w = normal(64, 96, dtype=dtype), normal(48, 96, dtype=dtype)
    with Fp32Matmul():
        ours = nn.functional.linear(x, w)
    exact = x.double() @ w.double().T
    ulp = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    assert float(((ours.double() - exact).abs() / exact.abs().clamp(min=1.0)).max()) <= 1.01 * ulp


@pytest.mark.parametrize("words", [{"is_causal": True}, {"attn_mask": "rows"}, {"attn_mask": "scores"}, {}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_fp32_where_a_gradient_goes_back(dtype: torch.dtype, words: dict[str, object]) -> None:
    q, k, v = (normal(2, heads, 40, 16, dtype=dtype) for heads in (4, 2, 2))
    towards = normal(2, 4, 40, 16, dtype=dtype)
    allowed = torch.ones(40, 40, dtype=torch.bool).tril()
    masks = {"rows": allowed, "scores": torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)}
    words = {name: masks.get(str(value), value) for name, value in words.items()}

    def found(scope: AbstractContextManager[object], number: torch.dtype) -> list[Tensor]:
        operands = [x.to(number, copy=True).requires_grad_() for x in (q, k, v)]
        wide = {n: w.to(number) if w is masks["scores"] else w for n, w in words.items()}
        with scope:
            out = nn.functional.scaled_dot_product_attention(*operands, enable_gqa=True, **wide)
        out.backward(towards.to(number))
        return [out, *(x.grad for x in operands if x.grad is not None)]

    ours, exact = found(Fp32Matmul(), dtype), found(nullcontext(), torch.float32)
    assert len(ours) == 4
    assert {x.dtype for x in ours} == {dtype}
    for one, wide in zip(ours, exact, strict=True):
        assert torch.equal(one, wide.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "rows", "gradient", "widened"),
    [
        (torch.bfloat16, 40, True, True),
        (torch.bfloat16, 40, False, False),
        (torch.float16, 40, False, True),
        (torch.float16, 8, False, False),
        (torch.float32, 40, True, False),
    ],
)
def test_attention_that_its_kernel_is_good_at_passes(
    dtype: torch.dtype, rows: int, gradient: bool, widened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp32 = products._in_fp32
    wide: list[None] = []

    def noted(*words: Any) -> Tensor:
        wide.append(None)
        return in_fp32(*words)

    monkeypatch.setattr(products, "_in_fp32", noted)
    q, k, v = (normal(1, 1, length, 16, dtype=dtype) for length in (rows, 40, 40))
    v.requires_grad_(gradient)  # as good as q
    with Fp32Matmul():
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        assert bool(wide) is widened
        wide.clear()
        with torch.no_grad():
            nn.functional.scaled_dot_product_attention(query=q, key=k, value=v)
        assert bool(wide) is (widened and not gradient)
    assert out.dtype == dtype


def test_few_rows_other_dtypes_and_mixtures_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    widened: list[torch.dtype] = []
    monkeypatch.setattr(products, "_widened", lambda value: widened.append(torch.float32) or value)
    w = normal(64, 24)
    with Fp32Matmul():
        torch.mm(normal(8, 64, dtype=torch.bfloat16), w.bfloat16())
        torch.mm(normal(40, 64), w)
        torch.mm(normal(40, 64, dtype=torch.bfloat16), w.bfloat16(), out=torch.empty(40, 24).bfloat16())
        with pytest.raises(RuntimeError):
            torch.mm(normal(40, 64, dtype=torch.bfloat16), w)
        assert widened == []
        torch.mm(normal(40, 64, dtype=torch.bfloat16), w.bfloat16())
    assert widened


def test_only_this_thread_and_only_inside() -> None:
    x, w = normal(40, 64, dtype=torch.bfloat16), normal(64, 24, dtype=torch.bfloat16)
    seen: list[bool] = []

    def look() -> None:
        seen.append(bool(torch.overrides._get_current_function_mode_stack()))

    with Fp32Matmul():
        other = threading.Thread(target=look)
        other.start()
        other.join()
        look()
        torch.mm(x, w)
    look()
    assert seen == [False, True, False]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_a_model_says_the_same(name: str) -> None:
    model = tiny_model(name).eval().to(torch.bfloat16)
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=ids).logits.float()
        with Fp32Matmul():
            widened = model(input_ids=ids).logits
        exact = model.float()(input_ids=ids).logits
    assert widened.dtype == torch.bfloat16
    assert (widened - exact).norm() < 1.5 * (plain - exact).norm() + 1e-6


@pytest.mark.parametrize(("seconds", "fast"), [(0.5, True), (1.9, True), (2.1, False), (10.0, False)])
def test_units_are_found_by_time(seconds: float, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.bfloat16: seconds, torch.float32: 1.0}
    monkeypatch.setattr(precision, "_seconds", times.__getitem__)
    fast_matmul_supported.cache_clear()
    try:
        assert fast_matmul_supported(torch.bfloat16, "cpu") is fast
        assert isinstance(matmul_scope(torch.bfloat16, torch.device("cpu")), Fp32Matmul) is not fast
        assert fast_matmul_supported(torch.bfloat16, "cuda")
        assert fast_matmul_supported(torch.float32, "cpu")
    finally:
        fast_matmul_supported.cache_clear()
