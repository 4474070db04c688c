"""Observers that draw events, and tables of results. Floor 4: nothing below imports it.

rich.py      a live display for a terminal          plain.py   one line per event, for a log
jsonl.py     one JSON object per event              choose.py  which of them, and when
state.py     events folded into what a display shows
tables.py    results: the summary of a run; findings
load.py      results: the summary of a load and of a verification
maps.py      results: the map of a model
escapes.py   text from outside, without the characters that a terminal acts upon
format.py    sizes, durations, names that fit
"""
