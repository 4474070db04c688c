#!/usr/bin/env bash
# Run the gpu suite on a machine with a CUDA device.
#
#   scripts/gpu_check.sh [pytest options]
#
# Progress goes to stderr. stdout is one line of JSON: the device, how many tests passed, failed and were
# skipped, seconds. Exit 0 when something ran and nothing failed. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi
xml=$(mktemp)
trap 'rm -f "$xml"' EXIT
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest tests/gpu -m gpu -q --junitxml "$xml" "$@" >&2
"$python" - "$xml" <<'END'
import json
import sys
import xml.etree.ElementTree as tree

import torch

try:
    suite = next(tree.parse(sys.argv[1]).getroot().iter("testsuite"))
    count = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    seconds = float(suite.get("time", "0"))
except (tree.ParseError, StopIteration):
    count, seconds = {"tests": 0, "failures": 0, "errors": 1, "skipped": 0}, 0.0
failed = count["failures"] + count["errors"]
passed = count["tests"] - failed - count["skipped"]
device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
result = {
    "device": device,
    "torch": torch.__version__,
    "passed": passed,
    "failed": failed,
    "skipped": count["skipped"],
    "seconds": round(seconds, 1),
    "ok": failed == 0 and passed > 0,
}
print(json.dumps(result))
sys.exit(0 if result["ok"] else 1)
END
