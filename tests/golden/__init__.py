"""Files that an output must equal. `make golden` (UPDATE_GOLDEN=1) writes them anew; review the diff."""

import difflib
import os
from pathlib import Path

FOLDER = Path(__file__).parent


def check_golden(name: str, text: str) -> None:
    """Fail unless `text` is what the golden file `name` holds."""
    path = FOLDER / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    difference = difflib.unified_diff(expected.splitlines(), text.splitlines(), name, "now", lineterm="")
    assert text == expected, "\n".join([*difference, "if this is meant: make golden"])
