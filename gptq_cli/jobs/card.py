"""The facts of a model card: gathered of a finished checkpoint before it is put in place."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from gptq_cli.checkpoint.verify import check_targets
from gptq_cli.config import QuantizeJob
from gptq_cli.events import Observer, Warned
from gptq_cli.model.model_class import purpose_of
from gptq_cli.model.skeleton import Skeleton
from gptq_cli.model.source_card import base_model_of, read_source_card
from gptq_cli.readers import Target
from gptq_cli.results.card import CARD, HERE, CardFacts, CardMaker, SourceCard
from gptq_cli.results.run import RunReport

_LISTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "quantize_config.json")


@dataclass(slots=True)
class Card:
    """The card of one run: made when the checkpoint is complete, and again when it was measured."""

    make: CardMaker
    job: QuantizeJob
    skeleton: Skeleton
    observer: Observer
    name: str = HERE
    """What commands in it call the checkpoint."""
    _facts: CardFacts | None = field(default=None, init=False)

    def files(self, report: RunReport, directory: Path) -> dict[str, str]:
        """Names and texts of its files, for the checkpoint in `directory`."""
        if self._facts is None:
            self._facts = self._gathered(directory)
        return dict(self.make(report, self._facts))

    def _gathered(self, directory: Path) -> CardFacts:
        files, code = self.skeleton.files, self.skeleton.ref.trust_remote_code
        verified = check_targets(directory, get_args(Target), trust_remote_code=code)
        return CardFacts(
            name=self.name,
            base_model=base_model_of(files.source, files.directory),
            calibration=tuple(map(str, self.job.calibration.sources)),
            source=self._source_card(),
            pipeline_tag=purpose_of(self.skeleton.model),
            targets=verified.targets,
            digests=digests_of(directory),
        )

    def _source_card(self) -> SourceCard:
        directory = self.skeleton.files.directory
        try:
            return read_source_card(directory)
        except ValueError as error:
            self.observer(
                Warned(
                    f"{CARD} of the model cannot be used: {error}; its licence, language and tags are not in "
                    "the new card",
                    f"correct {directory / CARD}, or write them into the new card by hand",
                )
            )
            return SourceCard()


def digests_of(directory: Path) -> tuple[tuple[str, str], ...]:
    """(file, sha256) of the weights and configs in `directory`, sorted."""
    names = sorted({path.name for pattern in _LISTED for path in directory.glob(pattern)})
    found = []
    for name in names:
        with (directory / name).open("rb") as file:
            found.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
    return tuple(found)
