"""How a planned run treats weights and hidden states, in words for people."""

from __future__ import annotations

from collections.abc import Iterator

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU, format_size
from gptq_cli.placement.names import owner
from gptq_cli.placement.placement import Placement
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.device_plans import weights_on
from gptq_cli.wording import names_text, number_of


def streaming_words(facts: ModelFacts, placement: Placement, schedule: Schedule) -> tuple[str, ...]:
    """What is read when, and where hidden states rest: a sentence each, without a full stop."""
    return tuple(_sentences(facts, placement, schedule))


def _sentences(facts: ModelFacts, placement: Placement, schedule: Schedule) -> Iterator[str]:
    streamed = [block for block in facts.blocks if placement.streams(block)]
    if streamed:
        largest = format_size(max(held.streamed for held in weights_on(placement, facts).values()))
        verb = "is" if len(streamed) == 1 else "are"
        total = number_of(len(facts.blocks), "block", verb, verb)
        count = f"{len(streamed)} of {total}" if len(streamed) < len(facts.blocks) else f"all blocks {verb}"
        if len(facts.blocks) == 1:
            count = "the one block is"
        ahead = ", the next one ahead into main memory" if schedule.reads_ahead else ", none ahead"
        yield f"{count} read from the files, one at a time (up to {largest}){ahead}"
    resting = len(facts.blocks) - len(streamed)
    if resting:
        rest = number_of(resting, "block", "rests", "rest")
        moved = "is moved" if resting == 1 else "are moved"
        yield f"{rest} in main memory and {moved} to {placement.main_device} by hooks"
    stays = _named(facts)
    if stays:
        verb = "are" if len(stays) > 1 else "is"
        yield f"{names_text(stays)} {verb} not computed with: left in the files"
    devices = {block.activation_device for block in schedule.blocks}
    where = " and ".join("main memory" if device == CPU else str(device) for device in sorted(devices))
    if where:
        pinned = ", pinned" if any(block.activations_on_host for block in schedule.blocks) else ""
        yield f"hidden states of the calibration text rest in {where}{pinned}"


def _named(facts: ModelFacts) -> list[str]:
    """What stays in the files: modules, and towers as a whole."""
    towers = [part.name for part in facts.beside if part.in_class]
    found = (next((t for t in towers if n.startswith(f"{t}.")), owner(n)) for n in sorted(facts.uncalled))
    return list(dict.fromkeys(found))
