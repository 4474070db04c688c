"""Text sources -> token batches, seeded: what the Hessians are made of, and what perplexity is read on."""

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
