"""Every package that the code imports is a declared dependency, and every dependency is used."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from gptq_cli.jobs.doctor import OPTIONAL

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
USED_WHERE_INSTALLED = {"gptqmodel", "lm_eval", "triton"}
"""Packages with kernels: `--kernel gptqmodel` says so where it is missing; torch for CUDA brings Triton."""


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[ ;<>=!~\[]", text, maxsplit=1)[0]) for text in requirements}


DECLARED = names_of(PROJECT["dependencies"])


def third_party_imports() -> Iterator[tuple[str, str]]:
    """(top-level module, file) of every import anywhere in the package; `x.numpy()` needs numpy as well."""
    for path in (ROOT / "gptq_cli").rglob("*.py"):
        where = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                names = ["numpy"] if node.func.attr in ("numpy", "from_numpy") else []
            for top in {name.partition(".")[0] for name in names}:
                if top not in {*sys.stdlib_module_names, "_typeshed", "gptq_cli"}:
                    yield top, where


IMPORTED = dict(third_party_imports())


def distributions_of(module: str) -> set[str]:
    return {normal(name) for name in packages_distributions().get(module, [module])}


@pytest.mark.parametrize("module", sorted(IMPORTED))
def test_what_is_imported_is_declared(module: str) -> None:
    if module not in USED_WHERE_INSTALLED:
        assert distributions_of(module) & DECLARED, f"{IMPORTED[module]} imports {module}"


def test_what_is_declared_is_used() -> None:
    used = {name for module in IMPORTED for name in distributions_of(module)}
    assert used >= DECLARED


def test_what_is_declared_has_a_version_that_passed() -> None:
    pinned = names_of((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:])
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    assert names_of([*PROJECT["dependencies"], *extras]) <= pinned


def test_the_check_above_can_fail() -> None:
    assert {"torch", "numpy", "pyarrow", "tqdm", "jinja2", "filelock"} <= set(IMPORTED)
    assert "packaging" not in DECLARED


def test_doctor_calls_optional_what_is() -> None:
    assert not names_of(list(OPTIONAL)) & DECLARED
