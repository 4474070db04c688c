"""What a finished command reports: frozen reports, written to report.json and printed by `--json`."""
