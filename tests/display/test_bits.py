"""How a budget of bits is told."""

from __future__ import annotations

from dataclasses import replace

from gptq_cli.display.bits import bits_rows, kind_of, kinds, widths_text
from gptq_cli.results.bits import BitChoice, FusedBits, UniformBits
from gptq_cli.results.kept import OwnSettings


def fused(*names: str, bits: int | None = 4, kl: float = 0.01) -> FusedBits:
    return FusedBits(linears=names, weights=100, bits=bits, size_bytes=50, kl=kl)


QKV = tuple(f"self_attn.{x}_proj" for x in "qkv")
CHOICE = BitChoice(
    asked=4.5,
    parameters=8_000_000,
    budget_bytes=4_500_000,
    size_bytes=4_499_999,
    measured_tokens=256,
    fused=(
        *(fused(*(f"model.layers.{n}.{x}" for x in QKV), bits=8 if n else 3) for n in range(3)),
        fused("model.layers.0.mlp.down_proj", bits=None, kl=0.0),
        fused("lm_head", bits=8),
    ),
    given_modules=(),
    quantize_head=False,
    uniform=(UniformBits(bits=4, bits_per_parameter=4.6, kl=0.1),),
)


def test_the_rows() -> None:
    assert list(bits_rows(CHOICE)) == [
        ("bit budget", "4.5 bits per parameter of the whole file, 4.5000 reached: 1 byte to spare"),
        ("predicted KL", "0.0400, from 256 tokens; all linears alike: 4 bits 0.1000 in 4.600"),
        ("bits", "model.layers.*.self_attn.q_proj, k_proj, v_proj: 3 bits in 1, 8 bits in 2"),
        ("", "model.layers.*.mlp.down_proj: dense"),
        ("", "lm_head: 8 bits"),
    ]


def test_before_it_is_measured() -> None:
    rows = dict(bits_rows(replace(CHOICE, measured_tokens=0)))
    assert "not measured yet" in rows["bit budget"]
    assert "predicted KL" not in rows


def test_names_and_widths() -> None:
    assert kind_of(fused("transformer.h.3.attn.c_attn")) == "transformer.h.*.attn.c_attn"
    assert kind_of(fused("a.0.experts.*.w1", "a.0.experts.*.w2")) == "a.*.experts.*.w1, w2"
    assert kind_of(fused("a.0.x.q", "a.0.y.q")) == "a.*.x.q, a.*.y.q"
    assert list(kinds(CHOICE.fused)["lm_head"]) == [8]
    assert widths_text(3, CHOICE) == "3 and 8 bits"
    assert widths_text(4, None) == "4 bits"
    own = OwnSettings(name="a", bits=8, group_size=32, sym=True, linears=1)
    assert widths_text(4, None, (own, replace(own, bits=4, group_size=64))) == "4 and 8 bits"
    assert widths_text(4, None, (own,), linears=2) == "4 and 8 bits"
    assert widths_text(4, None, (own, replace(own, bits=3)), linears=2) == "3 and 8 bits"
    assert widths_text(4, replace(CHOICE, fused=(fused("a", bits=None),))) == "4 bits"
