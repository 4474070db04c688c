"""Play the synthetic run of the tests on the real displays, to look at them.

python scripts/show_display.py rich|plain|jsonl [--blocks 30] [--speed 4] [--fail]
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from gptq_cli.display.choose import choose
from gptq_cli.display.load import load_summary
from gptq_cli.display.tables import findings_table, run_summary
from tests.display.events import REFUSED, load_report, report, sample_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("display", choices=["rich", "plain", "jsonl", "none"])
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--speed", type=float, default=4.0)
    parser.add_argument("--fail", action="store_true", help="raise in the middle")
    options = parser.parse_args()
    with choose(options.display, quiet=False, stream=sys.stderr, environ={}) as observer:
        last = 0.0
        for now, event in sample_run(options.blocks):
            time.sleep((now - last) / options.speed)
            last = now
            observer(event)
            if options.fail and now > 20:
                raise SystemExit("failed on purpose")
    console = Console(highlight=False)
    console.print(run_summary(report(options.blocks)))
    console.print(load_summary(load_report()))
    console.print(findings_table([REFUSED]))


if __name__ == "__main__":
    main()
