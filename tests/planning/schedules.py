"""Schedules for tests that need one and do not care about devices."""

from __future__ import annotations

from gptq_cli.model.facts import ModelFacts
from gptq_cli.placement.device import CPU
from gptq_cli.placement.placement import Placement, PlacementEntry
from gptq_cli.placement.schedule import Schedule
from gptq_cli.planning.cases import Work
from gptq_cli.planning.schedule import Way, make_schedule


def schedule(facts: ModelFacts, work: Work, *, parked: bool, reads_ahead: bool = False) -> Schedule:
    """Everything on the cpu."""
    entry = PlacementEntry("", CPU, facts.size_bytes, parameters=True)
    way = Way(parked=parked, on_host=False, reads_ahead=reads_ahead)
    return make_schedule(Placement((entry,), CPU, "a test"), facts, work, way)
