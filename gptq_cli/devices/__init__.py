"""The devices of this machine: how much memory they have, how it is flushed, how modules are lent to them.

accelerators.py   current accelerator, memory readings, peak resets, cache flushes
host_memory.py    what "free" and "peak" mean for the CPU side: cgroups, resident set size
offload.py        accelerate's dispatch hooks replaced by a cpu_offload_with_hook chain, and undone
"""
