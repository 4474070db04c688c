"""Text sources -> token batches, seeded: for the Hessians and for perplexity."""

from gptq_cli.calibration.batches import TokenBatches, evaluation_windows, make_batches, open_tokenizer
from gptq_cli.calibration.documents import Documents
from gptq_cli.calibration.text import read_documents

__all__ = [
    "Documents",
    "TokenBatches",
    "evaluation_windows",
    "make_batches",
    "open_tokenizer",
    "read_documents",
]
