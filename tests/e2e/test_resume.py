"""The same command run again goes on after the finished blocks, and writes what one run would write."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptq_cli import jobs
from gptq_cli.checkpoint import journal as journal_module
from gptq_cli.checkpoint.journal import Journal
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.engine import block as block_module
from gptq_cli.engine import mixed
from gptq_cli.engine import run as run_module
from gptq_cli.errors import GptqError
from gptq_cli.jobs import forecast, keeping, snapshot_time
from tests.conftest import TinyFactory
from tests.e2e.commands import FAST, Ran, gptq
from tests.e2e.killed import content
from tests.e2e.test_interrupt import hear_signals


@pytest.fixture(autouse=True)
def snapshots_whenever_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_time, "SNAPSHOT_SHARE", 1e9)
    monkeypatch.setattr(snapshot_time, "REDONE_SHARE", 0.0)


def words_of(model: Path, out: Path, text: Path, *more: str) -> list[str]:
    return ["quantize", str(model), "--out", str(out), "--calibration", str(text), *FAST, *more]


def quantized(model: Path, out: Path, text: Path, *more: str, interrupted: bool = False) -> Ran:
    return gptq(*words_of(model, out, text, *more), interrupted=interrupted)


def killed(argv: list[str], out: Path, points: list[float | str], **more: Any) -> list[dict[str, Any]]:
    """What came of killing the run at each point and running it again."""
    job = json.dumps({"argv": argv, "out": str(out), "points": points, **more})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.killed", job],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)["found"]
    return found


def assert_all_resumed(found: list[dict[str, Any]]) -> None:
    for one in found:
        where = (one["at"], one["call"], one["log"])
        assert one["killed"] == -signal.SIGKILL, where
        # where the last rename was done, the checkpoint is complete, and the command says that it exists
        assert one["resumed"] == (3 if one["complete"] else 0), where
        assert one["same"], where
        assert [name for name in one["after"] if name.startswith((".", "q."))] == [], where


def test_kill_9(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    points = [0.3, 0.62, 0.93, 0.98]
    out = tmp_path / "q"
    found = killed(words_of(tiny_llama, out, text), out, points)
    assert_all_resumed(found)
    assert {start for one in found for start in one["first_blocks"]} >= {0, 1}
    assert {one["linears"] for one in found} == {21}


@pytest.mark.slow
def test_kill_9_anywhere(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    assert_all_resumed(killed(words_of(tiny_llama, out, text), out, [n / 24 for n in range(1, 25)]))


@pytest.mark.slow
def test_kill_9_while_an_old_checkpoint_is_replaced(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    found = killed(
        words_of(tiny_llama, out, text, "--overwrite"), out, [0.5, 0.9, *(0.93 + n / 100 for n in range(8))]
    )
    for one in found:
        assert (one["resumed"], one["same"]) == (0, True), (one["at"], one["call"], one["log"])


@pytest.mark.slow
def test_killed_again_and_again(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    argv = words_of(tiny_llama, out, text, "--recipe", "best")
    found = killed(argv, out, [0.4], again=[5, 40, 80], share=0.0)  # without snapshots
    assert_all_resumed(found)
    assert found[0]["starts"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "gemma2", "bloom"])
@pytest.mark.parametrize("share", [0.0, 1e9], ids=["run again", "snapshot"])
def test_every_kind_of_block(name: str, share: float, text: Path, tiny: TinyFactory, tmp_path: Path) -> None:
    import torch

    model = tiny(name, dtype=torch.bfloat16)
    out = tmp_path / "q"
    found = killed(words_of(model, out, text), out, ["quantize_linears:-1"], share=share)
    assert_all_resumed(found)
    assert found[0]["first_blocks"] == [0, 1]


# -- in this process: a run that ends after a block, by an error of its own


class Stopped(GptqError):  # noqa: N818 - it says what happened
    """What ends a run in these tests."""


def stop_after(monkeypatch: pytest.MonkeyPatch, blocks: int, error: BaseException | None = None) -> None:
    """End the next run when so many of its blocks are kept."""
    real, seen = keeping.Keeping.keep, []

    def keep(keeper: Any, report: Any, captured: Any) -> None:
        real(keeper, report, captured)
        seen.append(report)
        if len(seen) == blocks:
            raise error if error is not None else Stopped("stopped")

    monkeypatch.setattr(keeping.Keeping, "keep", keep)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "q"
    assert quantized(tiny_llama, out, text).code == 0
    return content(out)


@pytest.fixture
def stopped(tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The destination of a run that ended after two of three blocks."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert quantized(tiny_llama, tmp_path / "q", text).code == 1
    return tmp_path / "q"


def findings(ran: Ran) -> dict[str, dict[str, Any]]:
    document = ran.document
    return {f["rule"]: f for f in document.get("findings") or document["error"]["findings"]}


def test_it_says_what_is_kept_and_what_it_found(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes]
) -> None:
    out = tmp_path / "q"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        first = quantized(tiny_llama, out, text)
    assert first.code == 1
    assert (
        f"s of work are kept in {tmp_path / '.q.gptq'}; to go on: gptq quantize {tiny_llama}" in first.stderr
    )
    planned = quantized(tiny_llama, out, text, "--dry-run", "--json")
    assert planned.code == 0
    said = findings(planned)["work-continued"]["message"]
    assert said.startswith("found block 0 of 3 from 20")
    assert said.endswith("the run goes on from there")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        second = quantized(tiny_llama, out, text)
    assert "blocks 0 to 1 of 3 from 20" in second.stderr
    third = quantized(tiny_llama, out, text, "--json")
    assert third.code == 0, third.stderr
    report = third.document
    assert [start["first_block"] for start in report["starts"]] == [0, 1, 2]
    assert [start["blocks"] for start in report["starts"]] == [1, 1, 1]
    assert report["seconds"] == pytest.approx(sum(start["seconds"] for start in report["starts"]))
    assert [block["name"] for block in report["blocks"]] == [f"model.layers.{n}" for n in range(3)]
    assert content(out) == reference
    assert sorted(os.listdir(tmp_path)) == ["q"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_finished(
    number: signal.Signals,
    tiny_llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference: dict[str, bytes],
) -> None:
    out, real = tmp_path / "q", mixed.quantize_linears
    with monkeypatch.context() as patch:
        calls: list[int] = []

        def quantize_linears(*words: Any, **named: Any) -> Any:
            calls.append(1)
            if len(calls) == 6:  # in the second block
                os.kill(os.getpid(), number)
            return real(*words, **named)

        patch.setattr(mixed, "quantize_linears", quantize_linears)
        ran = quantized(tiny_llama, out, text, "--json", interrupted=True)
    assert ran.code == 130
    error = ran.document["error"]
    assert error["message"].startswith("interrupted; block 0 of 3 from 20")
    assert error["hint"].startswith(f"to go on: gptq quantize {tiny_llama}")
    assert quantized(tiny_llama, out, text, "--resume", "required").code == 0
    assert content(out) == reference


SLOW_TO_STOP = """
import sys, time
from gptq_cli.checkpoint.destination import Destination
from gptq_cli.jobs import keeping
from gptq_cli.cli.app import main
real = keeping.Keeping.keep

def keep(keeper, report, captured):
    real(keeper, report, captured)
    print("kept", flush=True, file=sys.__stderr__)
    time.sleep(600)

def leave(place):
    print("leaving", flush=True, file=sys.__stderr__)
    time.sleep(600)

keeping.Keeping.keep, Destination._leave = keep, leave
sys.exit(main(sys.argv[1:]))
"""


def test_a_second_signal_ends_it_at_once(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    words = words_of(tiny_llama, out, text)
    command = [sys.executable, "-c", SLOW_TO_STOP, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line == "kept\n":
                process.send_signal(signal.SIGTERM)
            if line == "leaving\n":
                process.send_signal(signal.SIGINT)
                break
        assert process.wait(timeout=60) == 130
    assert quantized(tiny_llama, out, text, "--resume", "required").code == 0


def test_another_job_is_refused_and_the_work_stays(
    tiny_llama: Path, text: Path, stopped: Path, reference: dict[str, bytes]
) -> None:
    before = content(stopped.parent / ".q.gptq" / "result")
    ran = quantized(tiny_llama, stopped, text, "--bits", "8", "--damp-percent", "0.01", "--json")
    assert ran.code == 3
    found = findings(ran)["work-of-another-job"]
    assert "quantize.bits (4, now 8)" in found["message"]
    assert "quantize.damp_percent (0.05, now 0.01)" in found["message"]
    assert found["hint"].startswith("--resume never (removes it and starts over); or --out ")
    assert content(stopped.parent / ".q.gptq" / "result") == before
    assert quantized(tiny_llama, stopped, text, "--seed", "1").code == 3
    assert quantized(tiny_llama, stopped, text, "--resume", "required").code == 0
    assert content(stopped) == reference


def test_another_model_is_another_job(tiny: TinyFactory, text: Path, stopped: Path) -> None:
    ran = quantized(tiny("llama", seed=1), stopped, text, "--json")
    assert ran.code == 3
    assert "file model.safetensors (" in findings(ran)["work-of-another-job"]["message"]


def test_what_may_differ(
    tiny_llama: Path, text: Path, stopped: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """Another map, batch size and spelling of the same model and text."""
    copied = shutil.copytree(tiny_llama, tmp_path / "model")
    other = shutil.copy(text, tmp_path / "same.txt")
    more = ("--batch-size", "2", "--device-map", "cpu", "--resume", "required", "--json")
    ran = quantized(copied, stopped, Path(other), *more)
    assert ran.code == 0, ran.stderr
    assert [start["first_block"] for start in ran.document["starts"]] == [0, 2]
    assert sorted(content(stopped)) == sorted(reference)


def test_resume_never_starts_over(
    tiny_llama: Path, text: Path, stopped: Path, reference: dict[str, bytes]
) -> None:
    ran = quantized(tiny_llama, stopped, text, "--resume", "never", "--json")
    assert ran.code == 0
    assert len(ran.document["starts"]) == 1
    assert content(stopped) == reference


def test_strict_also_holds_for_what_is_finished(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a strict run would end well with linears that fell back."""
    out, real = tmp_path / "q", mixed.quantize_linears

    def fallen(*words: Any, **named: Any) -> Any:
        return [replace(one, method="rtn", attempts=9) for one in real(*words, **named)]

    with monkeypatch.context() as patch:
        patch.setattr(mixed, "quantize_linears", fallen)
        stop_after(patch, 1)
        assert quantized(tiny_llama, out, text).code == 1
    strict = quantized(tiny_llama, out, text, "--strict")
    assert strict.code == 5
    assert "'model.layers.0.self_attn.q_proj' and 6 more of the finished blocks fell back" in strict.stderr
    (command,) = [w for w in strict.stderr.splitlines() if "to go on without --strict: gptq quantize" in w]
    assert "--strict" not in command.split("gptq quantize")[-1]
    assert quantized(tiny_llama, out, text, "--resume", "required").code == 0


def test_resume_required_without_work(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    ran = quantized(tiny_llama, tmp_path / "q", text, "--resume", "required", "--json")
    assert ran.code == 3
    assert "is not there" in findings(ran)["work-required"]["message"]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_was_removed_is_no_loss_but_time(
    tiny_llama: Path, text: Path, stopped: Path, reference: dict[str, bytes]
) -> None:
    shutil.rmtree(stopped.parent / ".q.gptq")
    assert quantized(tiny_llama, stopped, text).code == 0
    assert content(stopped) == reference


def flip(path: Path, at: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shard(folder: Path) -> None:
    """Flip a bit in the codes of block 1."""
    path = folder / "result" / "model.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    begin, _ = header["model.layers.1.mlp.up_proj.qweight"]["data_offsets"]
    flip(path, 8 + size + begin + 5)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, list[int]]] = {
    "manifest": (lambda f: flip(f / "journal" / "manifest.json", 50), "manifest.json is damaged", [0]),
    "manifest cut": (lambda f: os.truncate(f / "journal" / "manifest.json", 60), "is damaged", [0]),
    "manifest gone": (lambda f: (f / "journal" / "manifest.json").unlink(), "is missing", [0]),
    "block": (lambda f: flip(f / "journal" / "block-00001.json"), "block-00001.json is damaged", [0, 1]),
    "block gone": (lambda f: (f / "journal" / "block-00000.json").unlink(), "is missing", [0]),
    "shard": (shard, "tensor model.layers.1.mlp.up_proj.qweight is not in the files", [0, 1]),
    "shard gone": (lambda f: (f / "result" / "model.safetensors").unlink(), "is not in the files", [0]),
    "header": (lambda f: flip(f / "result" / "model.safetensors", 20), "is not in the files", [0]),
    "snapshot": (lambda f: flip(f / "journal" / "hidden-2.safetensors"), "snapshot cannot be used", [0, 2]),
    "snapshot gone": (lambda f: (f / "journal" / "hidden-2.safetensors").unlink(), "is missing", [0, 2]),
    "marker": (lambda f: os.truncate(f / "run.json", 20), "run.json is damaged; its copy is used", [0, 2]),
    "marker gone": (lambda f: (f / "run.json").unlink(), "run.json is gone; its copy is used", [0, 2]),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_found_told_and_done_again(
    what: str, tiny_llama: Path, text: Path, stopped: Path, reference: dict[str, bytes]
) -> None:
    damage, said, starts = DAMAGES[what]
    damage(stopped.parent / ".q.gptq")
    ran = quantized(tiny_llama, stopped, text, "--json")
    assert ran.code == 0, ran.stderr
    assert said in ran.stderr
    assert [start["first_block"] for start in ran.document["starts"]] in (starts, [0, *starts])
    assert content(stopped) == reference
    assert sorted(os.listdir(stopped.parent)) == ["q"]


def test_a_stray_file_in_the_result_is_named(
    tiny_llama: Path, text: Path, stopped: Path, reference: dict[str, bytes]
) -> None:
    """It would have become part of the checkpoint. What the run itself had written there is no stray."""
    (stopped.parent / ".q.gptq" / "result" / "thesis.tex").write_text("mine")
    ran = quantized(tiny_llama, stopped, text, "--json")
    assert ran.code == 0, ran.stderr
    said = f"removed thesis.tex from {stopped.parent / '.q.gptq' / 'result'}: no run wrote that"
    assert said in ran.stderr
    report = json.loads((stopped / "report.json").read_text())
    assert [one for one in report["warnings"] if said in one]
    assert not [one for one in ran.document["warnings"] if "json" in one]
    assert content(stopped) == reference


def test_a_full_disk(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes]
) -> None:
    out, real = tmp_path / "q", CheckpointWriter.add_packed

    def add_packed(writer: CheckpointWriter, linear: Any, packed: Any) -> None:
        if linear.name.startswith("model.layers.1."):
            with writer.disk():
                raise OSError(28, "No space left on device")
        real(writer, linear, packed)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "add_packed", add_packed)
        ran = quantized(tiny_llama, out, text)
    assert ran.code == 1
    assert "no space left for" in ran.stderr
    assert "block 0 of 3 from" in ran.stderr
    assert quantized(tiny_llama, out, text, "--resume", "required").code == 0
    assert content(out) == reference


def test_a_disk_too_full_for_a_snapshot(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes]
) -> None:
    def full(path: Path, tensors: Any) -> Any:
        path.write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keeping, "write_snapshot", full)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        ran = quantized(tiny_llama, tmp_path / "q", text)
    assert ran.stderr.count("the hidden states are not kept: there is no room for") == 1
    assert not list((tmp_path / ".q.gptq" / "journal").glob("hidden-*"))
    assert quantized(tiny_llama, tmp_path / "q", text, "--resume", "required").code == 0
    assert content(tmp_path / "q") == reference


def test_an_error_before_the_first_block_leaves_nothing(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*words: Any, **named: Any) -> Any:
        raise Stopped("stopped")

    monkeypatch.setattr(mixed, "quantize_linears", fail)
    assert quantized(tiny_llama, tmp_path / "q", text).code == 1
    assert os.listdir(tmp_path) == []


def test_a_model_that_changed_leaves_nothing(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    real = keeping.Keeping.keep

    def keep(keeper: Any, report: Any, captured: Any) -> None:
        real(keeper, report, captured)
        flip(model / "model.safetensors")

    monkeypatch.setattr(keeping.Keeping, "keep", keep)
    (tmp_path / "out").mkdir()
    ran = quantized(model, tmp_path / "out" / "q", text)
    assert ran.code == 1
    assert "changed during the run" in ran.stderr
    assert os.listdir(tmp_path / "out") == []


def test_other_libraries_are_told(
    tiny_llama: Path, text: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(keeping.versions())["torch"]
    monkeypatch.setattr(keeping, "versions", lambda: (("torch", "9.9"),))
    ran = quantized(tiny_llama, stopped, text)
    assert ran.code == 0
    assert f"what is kept was made with torch {before}, and this is 9.9" in ran.stderr


def test_weights_that_were_written_to_are_told(
    tiny_llama: Path, text: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped.parent / ".q.gptq" / "journal"
    journal = Journal.read(folder)
    journal.commit(replace(journal.manifest, written=(("model.safetensors", 1),)))
    monkeypatch.setattr(keeping, "written_times", lambda skeleton: (("model.safetensors", 2),))
    ran = quantized(tiny_llama, stopped, text)
    assert ran.code == 0
    assert "model.safetensors has another modification time" in ran.stderr


def test_two_runs_at_once(tiny_llama: Path, text: Path, stopped: Path) -> None:
    from gptq_cli.checkpoint.destination import Destination

    with Destination(stopped) as held:
        assert held.kept
        ran = quantized(tiny_llama, stopped, text, "--json")
        assert findings(ran).keys() == {"output-busy"}
        planned = findings(quantized(tiny_llama, stopped, text, "--dry-run", "--json"))
        assert "work-continued" in planned  # this process holds it, as a run that goes on does
    assert quantized(tiny_llama, stopped, text, "--resume", "required").code == 0


# -- out of memory at work


def test_memory_that_runs_out_is_tried_again_with_less(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    real, sizes = block_module.StageMoments.add, []

    def add(moments: Any, x: Any, *words: Any) -> None:
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        real(moments, x, *words)

    monkeypatch.setattr(block_module.StageMoments, "add", add)
    ran = quantized(tiny_llama, tmp_path / "q", text, "--json")
    assert ran.code == 0, ran.stderr
    assert sizes[:2] == [8, 8], "the first step on the cpu is to read no block ahead"
    assert max(sizes[2:]) == 2
    ahead, told = (w for w in ran.document["warnings"] if "out of memory" in w)
    assert "each block read when its turn comes, none ahead" in ahead
    assert told.startswith(
        "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): the block is tried"
    )
    assert "micro-batches of 2 instead of 8 samples" in told
    assert "sums are rounded in another order" in told


def test_memory_that_runs_out_in_a_later_block(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished is not done again, and what was stored of the block comes again."""
    real, done = mixed.quantize_linears, []

    def quantize_linears(*words: Any, **named: Any) -> Any:
        done.append(1)
        if len(done) == 7:  # the third stage of the second block
            raise MemoryError
        return real(*words, **named)

    monkeypatch.setattr(mixed, "quantize_linears", quantize_linears)
    ran = quantized(tiny_llama, tmp_path / "q", text, "--json")
    assert ran.code == 0, ran.stderr
    assert len(done) == 12 + 3
    assert len(ran.document["starts"]) == 1
    assert gptq("load", tmp_path / "q", "--verify", "--quiet").code == 0


def test_exit_4_can_be_gone_on_with(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes]
) -> None:
    real = block_module.pack

    with monkeypatch.context() as patch:
        packed: list[int] = []

        def pack(*words: Any) -> Any:
            packed.append(1)
            if len(packed) > 8:
                raise MemoryError
            return real(*words)

        patch.setattr(block_module, "pack", pack)
        ran = quantized(tiny_llama, tmp_path / "q", text)
    assert ran.code == 4
    assert "to go on: gptq quantize" in ran.stderr
    assert quantized(tiny_llama, tmp_path / "q", text, "--resume", "required").code == 0
    assert content(tmp_path / "q") == reference


def test_fewer_samples_are_known_not_to_go_on_with_what_is_kept(
    tiny_llama: Path, text: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before the run is back at the first block that is not finished."""

    def full(*words: Any, **named: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "capture", full)
        ran = quantized(tiny_llama, stopped, text)
    assert ran.code == 4
    assert "--samples 4 --resume never (the work begins anew)" in ran.stderr
    assert quantized(tiny_llama, stopped, text, "--samples", "4").code == 3


# -- a trial, and the first block against the plan


def test_a_trial_without_memory_has_nothing_that_would_begin_anew(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, packed = block_module.pack, []

    def pack(*words: Any) -> Any:
        packed.append(1)
        if len(packed) > 8:  # in the second block
            raise MemoryError
        return real(*words)

    monkeypatch.setattr(block_module, "pack", pack)
    ran = quantized(tiny_llama, tmp_path / "q", text, "--blocks", "2")
    assert ran.code == 4
    assert "--samples 4; or" in ran.stderr


def test_a_trial_writes_nothing(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    words = words_of(tiny_llama, tmp_path / "q", text, "--blocks", "1")
    ran = gptq(*words, "--json")
    assert ran.code == 0, ran.stderr
    report = ran.document
    assert [block["name"] for block in report["blocks"]] == ["model.layers.0"]
    assert report["blocks_total"] == 3
    assert report["seconds"] > report["blocks"][0]["seconds"]
    assert os.listdir(tmp_path) == []
    shown = gptq(*words)
    assert "the whole would take about" in " ".join(shown.stdout.split())
    assert "1 block of 3, nothing was written" in shown.stdout
    assert gptq(*words, "--dry-run").code == 2
    assert gptq(*words[:-1], "0").code == 2


def test_a_job_has_another_name_than_its_module() -> None:
    """Else importing the module would put it in the place of the job: a second trial of a process failed."""
    for name in jobs.__all__:
        for _ in range(2):
            assert callable(getattr(jobs, name)), name


def test_a_first_block_that_takes_longer_than_planned(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "PROBE_FROM_SECONDS", 0.0)
    monkeypatch.setattr(
        forecast.Forecast,
        "seconds",
        lambda plan: dict.fromkeys((f"model.layers.{n}" for n in range(3)), 1e-6),
    )
    ran = quantized(tiny_llama, tmp_path / "q", text, "--json")
    assert ran.code == 0
    (told,) = [w for w in ran.document["warnings"] if "the first block took" in w]
    assert "were planned" in told


def test_a_journal_of_another_version(
    tiny_llama: Path, text: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.read(stopped.parent / ".q.gptq" / "journal")
    monkeypatch.setattr(journal_module, "VERSION", 2)
    ran = quantized(tiny_llama, stopped, text, "--resume", "required", "--json")
    assert ran.code == 3
    assert "has version 1; this program writes 2" in findings(ran)["work-required"]["message"]
    assert journal.manifest.version == 1
