#!/usr/bin/env bash
# Everything that only a machine with a CUDA device can show, in one call of at most nine minutes.
#
#   scripts/gpu_check.sh [--out DIR] [--wheels DIR] [--tiny] [--simulated] [pytest options]
#
#   1  the tests of tests/gpu: placement, offload, memory as predicted, the maths on a device
#   2  the kernels beside torch, bit for bit (tests/gptq/kernels.py)
#   3  scripts/bench_gpu.py: seconds by phase beside the limit, predicted and measured peaks, GPTQModel
#
# --out       where the results go, at most 8 small files (default: gpu-check)
# --wheels    install these wheels first, into a folder of this call, from nowhere else
# --tiny      the benchmark in small: does the script work
# --simulated without a card: 1 on the make-believe CUDA, 2 in Triton's interpreter, 3 in small on the CPU
#
# Progress goes to stderr. stdout is one line of JSON: the versions, what passed, the benchmark; it is in
# DIR/check.json, too. Exit 0 when something ran and nothing failed. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
deadline=$((SECONDS + 520)) tests_seconds=${TESTS_SECONDS:-240}
out=gpu-check wheels="" simulated="" bench=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --wheels) wheels=$2; shift 2 ;;
        --tiny) bench=(--tiny); shift ;;
        --simulated) simulated=yes bench=(--tiny); shift ;;
        *) break ;;
    esac
done
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi
mkdir -p "$out" && rm -f "$out"/{check.json,bench_gpu.json,tests.xml,kernels.xml,log.txt} || exit 1
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl >&2 || exit 1
    export PYTHONPATH="$PYTHONPATH:$site"
fi

run() {  # run NAME SECONDS COMMAND...: at most so long, then interrupted; its output on stderr and in the log
    local name=$1 seconds=$2
    shift 2
    timeout --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$out/log.txt" >&2
    ended[$name]=${PIPESTATUS[0]}
}
declare -A ended

if [ -n "$simulated" ]; then
    run tests "$tests_seconds" "$python" -m tests.fakecuda tests/gpu -q --junitxml "$out/tests.xml" "$@"
    TRITON_INTERPRET=1 run kernels "$tests_seconds" "$python" -m pytest tests/gptq/kernels.py -q --junitxml "$out/kernels.xml"
else
    run tests "$tests_seconds" "$python" -m pytest tests/gpu -m gpu -q --junitxml "$out/tests.xml" "$@"
    run kernels 120 "$python" -m pytest tests/gptq/kernels.py -q --junitxml "$out/kernels.xml"
fi
left=$((deadline - SECONDS))
left=$((left > 30 ? left : 30))
run bench "$left" "$python" scripts/bench_gpu.py --out "$out" --seconds "$left" ${bench[@]+"${bench[@]}"}

"$python" - "$out" "$SECONDS" "${ended[tests]}" "${ended[kernels]}" <<'END'
import json
import platform
import sys
import xml.etree.ElementTree as tree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def tests(path, status):
    try:
        suite = next(tree.parse(path).getroot().iter("testsuite"))
    except (OSError, tree.ParseError, StopIteration):
        return {"passed": 0, "failed": 1, "skipped": 0, "names": ["did not end: see log.txt"]}
    count = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    names = [c.get("name") for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None]
    passed = count["tests"] - failed - count["skipped"]
    if status == 124:  # of timeout: there is a report of those that ran
        failed, names = failed + 1, [*names[:19], "interrupted: there was no time for the others"]
    return {"passed": passed, "failed": failed, "skipped": count["skipped"], "names": names[:20]}


def version_of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


out, seconds = Path(sys.argv[1]), int(sys.argv[2])
statuses = zip(("tests", "kernels"), map(int, sys.argv[3:]))
found = {name: tests(out / f"{name}.xml", status) for name, status in statuses}
bench = out / "bench_gpu.json"
result = {
    "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    "python": platform.python_version(),
    **{name: version_of(name) for name in ("torch", "transformers", "triton", "gptqmodel")},
    **found,
    "bench": json.loads(bench.read_text()) if bench.is_file() else None,
    "seconds": seconds,
}
result["ok"] = bool(
    result["bench"] and all(part["passed"] and not part["failed"] for part in found.values())
)
line = json.dumps(result)
(out / "check.json").write_text(line + "\n")
print(line)
sys.exit(0 if result["ok"] else 1)
END
