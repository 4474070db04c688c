"""Observers that draw events, and tables of results. Floor 4: nothing below imports it.

rich.py      a live display for a terminal          plain.py   one line an event, for a log
jsonl.py     one JSON object an event               choose.py  which of them, and when
state.py     events folded into what a display shows
tables.py    results: the summary of a run, of a load; findings        placement.py  the map of a model
escapes.py   what comes from outside, without the characters that a terminal acts upon
format.py    sizes, durations, names that fit
"""
