"""The version of the maths: raised by hand whenever the same inputs give other codes, scales or zeros.

A run that goes on where an earlier one ended must compute as that one did, so the number is part of what the
two have to have in common. `tests/gptq/test_version.py` holds a digest of the codes of a fixed input and
fails when they change without it.
"""

from __future__ import annotations

MATHS_VERSION = 7
