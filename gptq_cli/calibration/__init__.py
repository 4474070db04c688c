"""Text sources -> token batches, seeded: for the Hessians and for perplexity.

Torch is imported with the first name that needs it; the sources themselves do without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptq_cli.calibration.batches import TokenBatches, evaluation_windows, make_batches
    from gptq_cli.calibration.documents import Documents
    from gptq_cli.calibration.text import read_documents
    from gptq_cli.calibration.tokenizer import open_tokenizer

__all__ = [
    "Documents",
    "TokenBatches",
    "evaluation_windows",
    "make_batches",
    "open_tokenizer",
    "read_documents",
]
_MODULES = {"Documents": "documents", "open_tokenizer": "tokenizer", "read_documents": "text"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'batches')}"), name)
