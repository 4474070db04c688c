"""What a finished command knows: frozen reports, written to report.json and printed by `--json`."""
