#!/usr/bin/env python3
"""What it costs that a run can be continued, and what a kill makes it do again.

Runs the command in one piece, then for each of --kill (shares of the blocks) once more: killed with kill -9
in the block after that share, and run again. The files are compared. The last line is JSON. The shares of
journal and snapshots are those of the run in one piece; "again" is all that a killed run took beyond it,
opening and loading a second time included.

    python scripts/bench_resume.py                  the demo model, 4 bits, group 64, 128 x 512 tokens
    python scripts/bench_resume.py -- --bits 8      any options of gptq quantize after --
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fetch_demo_model import NAME, ROOT, FetchError, fetch

DEFAULTS = ["--bits", "4", "--group-size", "64", "--samples", "128", "--seq-len", "512"]
KILLS = (0.25, 0.5, 0.9)


@dataclass(frozen=True)
class Command:
    """A job of `gptq quantize` on the model."""

    model: Path
    out: Path
    options: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """The command line, with its events on stderr."""
        base = [sys.executable, "-m", "gptq_cli", "quantize", str(self.model), "--out", str(self.out)]
        return [*base, *DEFAULTS, *self.options, "--json", "--progress", "jsonl"]

    def run(self) -> tuple[float, dict[str, Any]]:
        """Seconds of the process, and its report."""
        started = time.perf_counter()
        done = subprocess.run(
            self.words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"bench_resume: {done.stderr[-2000:]}")
        return time.perf_counter() - started, json.loads(done.stdout)

    def kill(self, share: float) -> float:
        """Kill it in the block after this share of the blocks, at its last linear; seconds until then."""
        started = time.perf_counter()
        with subprocess.Popen(
            self.words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stderr is not None
            at = left = 0
            for line in process.stderr:
                event = json.loads(line)
                if event["event"] == "BlockStarted":
                    at = event["index"]
                    left = sum(len(stage) for stage in event["stages"])
                    wanted = int(share * event["total"])
                if event["event"] == "LinearQuantized":
                    left -= 1
                    if at == wanted and left <= 0:
                        process.send_signal(signal.SIGKILL)
                        break
        return time.perf_counter() - started


def content(path: Path) -> dict[str, bytes]:
    """Every file but report.json."""
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file() and p.name != "report.json"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a dense model directory (default: SmolLM2, fetched)")
    parser.add_argument("--kill", type=float, nargs="*", default=KILLS, help="shares of the blocks")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="options of gptq quantize, after --")
    arguments = parser.parse_args(argv)
    try:
        model = arguments.model or fetch(ROOT / "demo" / NAME, ROOT / "demo" / "cache")
    except FetchError as error:
        print(f"bench_resume: {error}", file=sys.stderr)
        return 1
    options = tuple(arguments.options)
    with tempfile.TemporaryDirectory(prefix="gptq-bench-") as folder:
        whole = Command(model, Path(folder) / "whole", options)
        seconds, report = whole.run()
        phases = report["phase_seconds"]
        shares = {name: phases.get(name, 0.0) / report["seconds"] for name in ("journal", "snapshots")}
        print(f"{model.name}: {seconds:.1f} s in one piece; {len(report['blocks'])} blocks")
        for name, share in shares.items():
            print(f"  {name:<12}{share:>8.2%} of the time")
        kills = []
        for number, share in enumerate(arguments.kill):
            command = Command(model, Path(folder) / f"killed-{number}", options)
            before = command.kill(share)
            after, resumed = command.run()
            back = resumed["phase_seconds"]
            found = {
                "at": share,
                "seconds_before": round(before, 1),
                "seconds_after": round(after, 1),
                "seconds_again": round(before + after - seconds, 1),
                "resume_seconds": round(back.get("resume", 0.0) + back.get("verify", 0.0), 2),
                "first_block": resumed["starts"][-1]["first_block"],
                "same": content(command.out) == content(whole.out),
            }
            kills.append(found)
            print(f"  killed at {share:.0%}: {found}")
    summary = {
        "model": model.name,
        "seconds": round(seconds, 1),
        "blocks": len(report["blocks"]),
        "block_seconds": round(sum(block["seconds"] for block in report["blocks"]), 1),
        "snapshot_bytes": report["snapshot_bytes"],
        **{f"{name}_share": round(share, 5) for name, share in shares.items()},
        "kills": kills,
        "torch": report["versions"].get("torch"),
    }
    print(f"\n{json.dumps(summary)}")
    return 0 if all(found["same"] for found in kills) else 1


if __name__ == "__main__":
    raise SystemExit(main())
