"""Several processes quantize one model, as torchrun starts them: real processes, gloo, on the CPU.

A process takes seconds to import torch and transformers, so all are forked from one that has imported them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptq_cli.cli.app import main
from gptq_cli.config import CalibrationConfig, ModelRef, QuantizeConfig
from gptq_cli.model.describe import model_facts
from gptq_cli.model.find import find_model
from gptq_cli.model.skeleton import open_skeleton
from gptq_cli.planning.cases import Work
from gptq_cli.planning.traffic import block_traffic
from tests.e2e.commands import write_text
from tests.e2e.test_resume import stop_after
from tests.encoders import STYLES, store_in_few_bits
from tests.planning.schedules import schedule
from tests.tiny import save_tiny

KINDS = ("llama", "gpt2", "gemma2", "falcon", "mixtral", "qwen3_moe")
FEW = ("llama", "mixtral")
UNSEEN = ("llama", "mixtral", "few-bits")
FEW_STEPS = ("--damp-percent", "0.9")
"""Two λ to try for a step: of three ranks one works ahead, see `engine.stage_factors`."""
PAIRED = 0.001
"""Of `--dense-share`: 16 of the 24 samples, so that ranks have samples of both kinds."""
TEXT = (
    *("--samples", "24", "--seq-len", "48", "--dense-share", str(PAIRED)),
    *("--group-size", "32", "--batch-size", "4"),
)
PATIENCE_SECONDS = 240
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ("tests.e2e.test_ranks", "gptq_cli.jobs.quantizing", "gptq_cli.jobs.together")
CONTEXT.set_forkserver_preload(list(PRELOADED))


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@dataclass(frozen=True)
class Line:
    """A command line of all ranks."""

    words: list[str]
    own: dict[int, list[str]] = field(default_factory=dict)
    """Words that a rank is given besides, by rank."""
    out_of_memory: int | None = None
    """A rank that has no memory left in its second block."""
    folders: dict[int, Path] = field(default_factory=dict)
    """Where a rank runs it, by rank."""
    environ: dict[int, dict[str, str]] = field(default_factory=dict)
    """Variables of a rank, by rank."""
    port: int = field(default_factory=free_port)


@dataclass(frozen=True)
class Ended:
    """What the ranks left, by rank."""

    codes: list[int]
    out: list[str]
    err: list[str]


class Started:
    """Processes that were started together; each runs the command lines one after the other."""

    def __init__(
        self, lines: list[Line], size: int, folder: Path, run: Callable[..., None] | None = None
    ) -> None:
        """`run`: instead of `run_rank`."""
        self._streams = [(folder / f"out-{rank}", folder / f"err-{rank}") for rank in range(size)]
        self.processes: list[ForkServerProcess] = []
        for rank, streams in enumerate(self._streams):
            process = CONTEXT.Process(target=run or run_rank, args=(lines, rank, size, streams))
            process.start()
            self.processes.append(process)

    def wait_until(self, words: str) -> None:
        """Until rank 0 has said `words` on stderr."""
        said, deadline = self._streams[0][1], time.monotonic() + PATIENCE_SECONDS
        while not (said.exists() and words in said.read_text(encoding="utf-8")):
            assert time.monotonic() < deadline, f"nothing was heard of {words!r}"
            time.sleep(0.005)

    def ended(self) -> Ended:
        """What is left when all have ended."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process in self.processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        out, err = (
            [path.read_text(encoding="utf-8") for path in paths] for paths in zip(*self._streams, strict=True)
        )
        return Ended([int(process.exitcode or 0) for process in self.processes], out, err)


def run_rank(lines: list[Line], rank: int, size: int, streams: tuple[Path, Path]) -> None:
    """What each process does: `main` for every command line; its exit code is that of the last one."""
    for number, path in enumerate(streams, start=1):
        with path.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
    }
    code = 0
    for line in lines:
        os.environ |= {"MASTER_PORT": str(line.port), **line.environ.get(rank, {})}
        os.chdir(line.folders.get(rank, "/"))
        with pytest.MonkeyPatch.context() as patch:
            if line.out_of_memory == rank:
                use_up_memory(patch)
            code = main([*line.words, *line.own.get(rank, [])])
    sys.exit(code)


def use_up_memory(patch: pytest.MonkeyPatch) -> None:
    """The second block of the next run ends as where torch's allocator has no more."""
    from gptq_cli.engine import loop

    real, seen = loop.quantize_block, []

    def quantize_block(*words: Any, **options: Any) -> Any:
        seen.append(words)
        if len(seen) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
        return real(*words, **options)

    patch.setattr(loop, "quantize_block", quantize_block)


def by_itself(patch: pytest.MonkeyPatch) -> None:
    """The next command is one process that torchrun started."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        patch.setenv(name, value)


def command(folder: Path, kind: str, out: str, *more: str) -> list[str]:
    text = ("--calibration", str(folder / "text.txt"), *TEXT)
    return ["quantize", str(folder / kind), "--out", str(folder / out), *text, *more]


def seen_from_here(folder: Path, kind: str, out: str) -> list[str]:
    """The same with a path of the model that depends on where a rank runs."""
    return ["quantize", f"./{kind}", *command(folder, kind, out, "--progress", "plain")[2:]]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {
        name: value for file in sorted(out.glob("*.safetensors")) for name, value in load_file(file).items()
    }


def flat(text: str) -> str:
    """Without the line breaks that a long path brings."""
    return " ".join(text.split())


def losses(out: Path) -> list[float]:
    report: Any = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return [linear["loss"] for block in report["blocks"] for linear in block["linears"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    write_text(made / "text.txt")
    for kind in KINDS:
        save_tiny(kind, made / kind)
    plain = save_tiny("qwen3_moe", made / "plain", dtype=torch.bfloat16)
    coded, _ = store_in_few_bits(plain, made, STYLES["fp8-blocks"])
    coded.rename(made / "few-bits")
    return made


@pytest.fixture(scope="module")
def by_one(folder: Path) -> None:
    """Every kind by one process that torchrun started, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        by_itself(patch)
        for kind in (*KINDS, "few-bits"):
            assert main(command(folder, kind, f"one-{kind}", "--quiet")) == 0
        for kind in FEW:
            assert main(command(folder, kind, f"one-ahead-{kind}", *FEW_STEPS, "--quiet")) == 0
        assert main(command(folder, "llama", "one-head", "--quantize-head", "--quiet")) == 0


@pytest.fixture(scope="module")
def by_two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Launches that are refused, every kind by two ranks, one with its head, one that one began, one whose
    files only the first sees, and at last one that is refused by what is there."""
    blind = {0: folder, 1: tmp_path_factory.mktemp("empty")}
    with pytest.MonkeyPatch.context() as patch:
        by_itself(patch)
        stop_after(patch, 1)
        assert main(command(folder, "llama", "two-begun", "--quiet")) == 1
    lines = [
        Line(command(folder, "llama", "wrong"), own={1: ["--seed", "3"]}),
        *(Line(seen_from_here(folder, kind, f"unseen-{kind}"), folders=blind) for kind in UNSEEN),
        *(Line(command(folder, kind, f"two-{kind}", "--progress", "plain")) for kind in KINDS),
        Line(command(folder, "llama", "two-head", "--quantize-head", "--progress", "plain")),
        Line(command(folder, "llama", "two-begun", "--progress", "plain")),
        Line(command(folder, "llama", "two-llama", "--progress", "plain")),  # it is there: refused
    ]
    return Started(lines, 2, tmp_path_factory.mktemp("two")).ended()


@pytest.fixture(scope="module")
def by_three(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Some kinds by three ranks, of which the last does not see the files, and at last one that has another
    model there."""
    empty, other = (tmp_path_factory.mktemp(name) for name in ("empty", "other"))
    save_tiny("llama", other / "llama", seed=7)
    seen = {0: folder, 1: folder, 2: empty}
    lines = [
        *(Line(seen_from_here(folder, kind, f"three-{kind}"), folders=seen) for kind in FEW),
        *(Line(command(folder, kind, f"ahead-{kind}", *FEW_STEPS)) for kind in FEW),
        Line(seen_from_here(folder, "llama", "other"), folders=seen | {2: other}),
    ]
    return Started(lines, 3, tmp_path_factory.mktemp("three")).ended()


def different(folder: Path, one: str, other: str) -> list[str]:
    """The names of tensors that two checkpoints do not share."""
    a, b = tensors(folder / one), tensors(folder / other)
    return [
        name
        for name in a.keys() | b.keys()
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]


@pytest.mark.parametrize("kind", [*KINDS, "head"])
def test_two_ranks_write_what_one_writes(kind: str, folder: Path, by_one: None, by_two: Ended) -> None:
    assert by_two.codes[0] == 3, by_two.err
    assert different(folder, f"one-{kind}", f"two-{kind}") == []
    assert losses(folder / f"two-{kind}") == pytest.approx(losses(folder / f"one-{kind}"), rel=1e-4)


@pytest.mark.parametrize("kind", FEW)
def test_three_ranks_write_what_one_writes(kind: str, folder: Path, by_one: None, by_three: Ended) -> None:
    assert flat(by_three.out[0]).count(" is ready after ") == 2 * len(FEW)
    assert different(folder, f"one-ahead-{kind}", f"ahead-{kind}") == []
    assert different(folder, f"one-{kind}", f"three-{kind}") == []


def test_the_result_says_who_worked_where_and_who_was_the_slowest(folder: Path, by_two: Ended) -> None:
    report = json.loads((folder / "two-llama" / "report.json").read_text(encoding="utf-8"))
    here = socket.gethostname()
    assert [(x["rank"], x["host"], x["device"]) for x in report["ranks"]] == [
        (0, here, "cpu"),
        (1, here, "cpu"),
    ]
    assert all(x["sent_bytes"] > 0 and x["waited_seconds"] > 0 for x in report["ranks"])
    assert f"2; rank 0 on {here}: cpu; rank 1 on {here}: cpu" in by_two.err[0]
    assert by_two.err[0].count("ranks after capture: rank ") == by_two.err[0].count("flush after capture")
    assert f"; rank 1 on {here}: cpu resident " in by_two.err[0]
    assert by_two.err[0].count("ranks after model.layers.2: rank ") >= 3, "llama, with its head and gone on"
    assert flat(by_two.out[0]).count(", the slowest") == flat(by_two.out[0]).count(" is ready after ")


@pytest.mark.parametrize(
    ("out", "size", "damp_percent"),
    [
        *((f"two-{kind}", 2, 0.05) for kind in KINDS),
        *((f"three-{kind}", 3, 0.05) for kind in FEW),
        *((f"ahead-{kind}", 3, 0.9) for kind in FEW),
    ],
)
def test_ranks_send_what_the_plan_says(
    out: str, size: int, damp_percent: float, folder: Path, by_two: Ended, by_three: Ended
) -> None:
    """To the byte, experts included: of these every one is reached from every leaf."""
    ref = ModelRef(model=str(folder / out.partition("-")[2]))
    facts = model_facts(open_skeleton(find_model(ref), ref))
    calibration = CalibrationConfig(samples=24, seq_len=48, batch_size=4)
    quantize = QuantizeConfig.of("balanced", group_size=32, damp_percent=damp_percent, dense_share=PAIRED)
    work = Work(quantize, calibration, size).on(facts)
    blocks = block_traffic(facts, work, schedule(facts, work, parked=True)).values()
    report = json.loads((folder / out / "report.json").read_text(encoding="utf-8"))
    for rank, found in enumerate(report["ranks"]):
        assert found["sum_bytes"] == sum(block[rank].sum_bytes for block in blocks)
        assert found["code_bytes"] == sum(block[rank].code_bytes for block in blocks)
        assert found["factor_bytes"] == sum(block[rank].factor_bytes for block in blocks)
        assert found["sum_bytes"] + found["code_bytes"] + found["factor_bytes"] < found["sent_bytes"]
    assert any(found["factor_bytes"] for found in report["ranks"]) == (damp_percent == 0.9)


def test_two_ranks_go_on_where_one_ended(folder: Path, by_one: None, by_two: Ended) -> None:
    assert first_blocks(folder / "two-begun") == [0, 1]
    assert different(folder, "one-llama", "two-begun") == []


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_a_run_without_a_launcher_loses_as_much(kind: str, folder: Path, by_one: None) -> None:
    """It sums in another order, so codes may differ, and losses by half a percent."""
    assert main(command(folder, kind, f"plain-{kind}", "--quiet")) == 0
    plain, leaves = losses(folder / f"plain-{kind}"), losses(folder / f"one-{kind}")
    assert sum(plain) == pytest.approx(sum(leaves), rel=5e-3)


def test_only_the_first_rank_talks(by_two: Ended) -> None:
    assert flat(by_two.out[0]).count(" is ready after ") == len(KINDS) + len(UNSEEN) + 2
    assert by_two.err[0].count("refused by preflight: 1 error") == 1
    assert (by_two.out[1], by_two.err[1]) == ("", "")
    assert by_two.codes[1] != 0, "a launcher sees that the last one failed"


def test_different_command_lines_are_an_error_of_the_first_rank_alone(folder: Path, by_two: Ended) -> None:
    assert "was started with '--seed' where rank 0 was with nothing" in by_two.err[0]
    assert "all ranks need the same command line" in by_two.err[0]
    assert not (folder / "wrong").exists()


@pytest.mark.parametrize("kind", UNSEEN)
def test_a_rank_that_does_not_see_the_files_is_sent_them(
    kind: str, folder: Path, by_one: None, by_two: Ended
) -> None:
    assert different(folder, f"one-{kind}", f"unseen-{kind}") == []
    assert (
        f"rank 1 on {socket.gethostname()} does not see ./{kind} (no such directory): rank 0 sends it the "
        "weights" in by_two.err[0]
    )


def test_another_model_on_another_rank_is_an_error_that_names_it(folder: Path, by_three: Ended) -> None:
    said = flat(by_three.err[0])
    assert by_three.codes == [2, 2, 2]
    assert "error: rank 2 (process " in said
    assert "./llama is another model here than on rank 0: file model.safetensors (" in said
    assert not (folder / "other").exists()


def goes_on_by_itself(folder: Path, out: str) -> None:
    """One process finishes what several began, with the same result as from the beginning."""
    with pytest.MonkeyPatch.context() as patch:
        by_itself(patch)
        assert main(command(folder, "llama", out, "--quiet")) == 0
    assert first_blocks(folder / out)[-1] >= 1
    assert different(folder, "one-llama", out) == []


def first_blocks(out: Path) -> list[int]:
    """Of every start of a run."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return [start["first_block"] for start in report["starts"]]


def test_a_killed_rank_ends_all_and_another_number_of_ranks_goes_on(
    folder: Path, tmp_path: Path, by_one: None
) -> None:
    started = Started([Line(command(folder, "llama", "killed", "--progress", "plain"))], 2, tmp_path)
    pid = started.processes[1].pid
    assert pid is not None
    started.wait_until("block 2/3")
    os.kill(pid, signal.SIGKILL)
    ended = started.ended()
    assert ended.codes == [1, -signal.SIGKILL]
    assert f"error: rank 1 (process {pid} on {socket.gethostname()}) ended at model.layers" in ended.err[0]
    assert "are kept in" in ended.err[0]
    assert "to go on: torchrun --nproc-per-node 2 -m gptq_cli quantize" in ended.err[0]
    goes_on_by_itself(folder, "killed")


def test_an_interruption_ends_all_and_one_process_goes_on(folder: Path, tmp_path: Path, by_one: None) -> None:
    started = Started([Line(command(folder, "llama", "stopped", "--progress", "plain"))], 2, tmp_path)
    started.wait_until("block 2/3")
    for process in started.processes:  # a terminal sends it to all of them
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
    ended = started.ended()
    assert ended.codes == [130, 130], ended.err
    assert "interrupted; block" in ended.err[0]
    assert "to go on: torchrun --nproc-per-node 2 -m gptq_cli quantize" in ended.err[0]
    assert (ended.out, ended.err[1]) == (["", ""], "")
    assert not (folder / "stopped").exists()
    goes_on_by_itself(folder, "stopped")


@pytest.mark.parametrize(("rank", "who"), [(0, "error: out of memory while"), (1, "error: rank 1 (process ")])
def test_a_rank_without_memory_ends_all_and_what_is_finished_is_kept(
    rank: int, who: str, folder: Path, tmp_path: Path, by_one: None
) -> None:
    out = f"memory-{rank}"
    line = Line(command(folder, "llama", out, "--progress", "plain"), out_of_memory=rank)
    ended = Started([line], 2, tmp_path).ended()
    assert ended.codes == [4, 4], ended.err
    assert ended.err[0].count("error: ") == 1
    assert who in ended.err[0]
    assert "out of memory while quantizing block model.layers.1 (2/3) on cpu: " in ended.err[0]
    assert "block 0 of 3" in ended.err[0]
    assert "to go on: torchrun --nproc-per-node 2 -m gptq_cli quantize" in ended.err[0]
    assert "--batch-size" in ended.err[0]
    assert (ended.out[1], ended.err[1]) == ("", "")
    goes_on_by_itself(folder, out)
