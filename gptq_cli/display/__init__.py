"""Observers that draw events, and tables of results. Nothing below imports it."""
