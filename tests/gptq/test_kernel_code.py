"""The Triton kernels as machine code, compiled for cards that need not be there: what a card would run rounds
as torch does, and keeps its tile in registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

TENSORS = {"B", "U", "weight", "S", "Z", "W", "E", "damped", "L", "G", "H", "s", "z", "C"}
NUMBERS = {"low", "high", "zero", "top"}
TILE_REGISTERS = 32
"""Of a thread: 128 columns x 32 rows in 128 threads; so many products for each column."""


def compiled(kernel: Any, capability: int, constants: dict[str, Any], options: dict[str, Any]) -> Any:
    triton = pytest.importorskip("triton", reason="Triton is not installed here (the `dev` extra has it)")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = dict.fromkeys(names, "i32") | {name: "fp32" for name in names if name in NUMBERS}
    kinds |= {name: "*fp32" for name in names if name in TENSORS}
    kinds |= {name: "*u8" for name in names if name == "codes"}
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kinds[name][0] == "*"},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "sym"), [("_solve", True), ("_sweep", False)])
def test_products_are_not_fused_and_the_tile_stays_in_registers(
    name: str, sym: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    pytest.importorskip("triton", reason="Triton is not installed here (the `dev` extra has it)")
    from gptq_cli.gptq import walk_triton
    from gptq_cli.gptq.grid import Grid

    grid = Grid(bits=4, sym=sym, positive_scales=False, search="minmax")
    options = walk_triton.TritonWalk()._options(128, grid)
    constants = {key: options.pop(key) for key in ("n", "SYM", "COLUMNS", "ROWS")}
    made = compiled(getattr(walk_triton, name), capability, constants, options)
    assert "fma" not in made.asm["ptx"]
    assert len(re.findall(r"div\.rn\.f32", made.asm["ptx"])) == 1
    assert "div.full" not in made.asm["ptx"]
    assert "div.approx" not in made.asm["ptx"]
    assert "st.local" not in made.asm["ptx"]
    code = machine_code(made, tmp_path)
    assert code.count("FMUL") > TILE_REGISTERS
    assert code.count("FFMA") < TILE_REGISTERS, "more than the division has"
    assert "STL" not in code, "spilled to local memory"


def test_the_check_above_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    pytest.importorskip("triton", reason="Triton is not installed here (the `dev` extra has it)")
    from gptq_cli.gptq import walk_triton

    constants = {"n": 128, "SYM": True, "COLUMNS": 128, "ROWS": 32}
    made = compiled(walk_triton._sweep, 80, constants, {"num_warps": 4, "enable_fp_fusion": True})
    assert machine_code(made, tmp_path).count("FFMA") > TILE_REGISTERS


def machine_code(made: Any, folder: Path) -> str:
    """What the card's instructions are, as text."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    if not tool.exists():
        pytest.skip("this Triton brings no disassembler")
    (folder / "kernel.cubin").write_bytes(made.asm["cubin"])
    command = [str(tool), str(folder / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
