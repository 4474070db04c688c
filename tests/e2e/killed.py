"""Runs that kill -9 ends at a chosen call, and that the same command goes on with: one process for many.

    python -m tests.e2e.killed '{"argv": […], "out": DIR, "points": [3, 17], "share": 1.0}'

A complete run comes first: it is the reference, and counts the calls at which a run may be killed. Each point
is then a fork of this process, so that libraries are imported once. The last line of stdout is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS: list[str] = []
"""The calls of this process, in order."""


def count_calls(kill_at: int | None) -> None:
    """Note every call that changes a disk, and every solve; end the process before call number `kill_at`, or
    the next one where two threads call at once."""
    from gptq_cli.checkpoint import destination, renames, snapshot, working_folder
    from gptq_cli.engine import mixed

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            if kill_at is not None and len(CALLS) >= kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            CALLS.append(name)
            return function(*words, **named)

        return call

    for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "pwrite", "ftruncate"):
        setattr(os, name, counted(name, getattr(os, name)))
    for module, name in (
        (destination, "exchange"),
        (destination, "rename_to_free"),
        (renames, "_renameat2"),
        (snapshot, "_bytes"),
        (working_folder, "remove"),
        (mixed, "quantize_linears"),
    ):
        setattr(module, name, counted(name, getattr(module, name)))


def content(path: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but report.json, which holds times."""
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "report.json")
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def forked(argv: list[str], kill_at: int | None, log: Path) -> int:
    """The exit status of the command in a fork; -9 where it was killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fork in a process with threads: they are idle
        child = os.fork()
    if child == 0:
        from gptq_cli.cli.app import main

        code = 99
        try:
            with log.open("a", encoding="utf-8") as stream:
                sys.stdout = sys.stderr = stream
                if kill_at is not None:
                    count_calls(kill_at)
                code = main(argv)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def place_of(point: float | int | str, calls: list[str]) -> int:
    """The number of a call: itself, a share of all, or `name:-1` for the last one of that name."""
    if isinstance(point, str):
        name, number = point.split(":")
        return [at for at, call in enumerate(calls) if call == name][int(number)]
    return round(point * (len(calls) - 1)) if isinstance(point, float) else point


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Kill at each point, go on, compare. `share`: of the time that snapshots may take. `again`: calls after
    which the run that goes on is killed as well."""
    import torch

    from gptq_cli.jobs import snapshot_time

    torch.set_num_threads(1)
    snapshot_time.SNAPSHOT_SHARE, snapshot_time.REDONE_SHARE = job.get("share", 1e9), 0.0
    argv, out = [str(word) for word in job["argv"]], Path(job["out"])
    log = out.parent / "log.txt"
    told = out.parent / "calls.json"
    if forked([*argv], None, log) != 0:
        raise SystemExit(log.read_text())
    wanted = content(out)
    keep_old = "--overwrite" in argv

    def clear() -> None:
        if not keep_old:
            shutil.rmtree(out, ignore_errors=True)

    clear()
    counting = os.fork()
    if counting == 0:
        from gptq_cli.cli.app import main

        with log.open("a", encoding="utf-8") as stream:
            sys.stdout = sys.stderr = stream
            count_calls(None)
            code = main(argv)
        told.write_text(json.dumps(CALLS))
        os._exit(code)
    os.waitpid(counting, 0)
    calls = json.loads(told.read_text())
    found = []
    for point in job["points"]:
        at = place_of(point, calls)
        clear()
        log.write_text("")
        code = forked(argv, at, log)
        left = sorted(path.name for path in out.parent.iterdir())
        for again in job.get("again", ()):
            forked(argv, again, log)
        complete = out.is_dir() and not keep_old
        after = forked(argv, None, log)
        report = json.loads((out / "report.json").read_text()) if (out / "report.json").is_file() else {}
        found.append(
            {
                "at": at,
                "call": calls[at] if at < len(calls) else "",
                "killed": code,
                "left": left,
                "complete": complete,
                "resumed": after,
                "same": content(out) == wanted,
                "starts": len(report.get("starts", ())),
                "first_blocks": [start["first_block"] for start in report.get("starts", ())],
                "linears": sum(len(block["linears"]) for block in report.get("blocks", ())),
                "after": sorted(path.name for path in out.parent.iterdir()),
                "log": log.read_text()[-3000:],
            }
        )
    return {"calls": len(calls), "found": found}


if __name__ == "__main__":
    json.dump(run(json.loads(sys.argv[1])), sys.stdout)
