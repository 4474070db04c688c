"""The model: finding it, knowing it without its weights, loading it; checkpoints, written and read.

source.py, hub.py     a directory or a hub id -> ModelFiles: names, shapes, bytes, and what is wrong
files.py              regular, inside the directory, unchanged since the model was opened
headers.py            the head of a safetensors file, read without trust
architecture.py       is this config a causal language model's?
skeleton.py           the model on the meta device: blocks, linears, what stays dense
blocks.py               found by structure
trace.py, reads.py      one forward without data: order, stages, experts, linears that are not called
conversion.py           names in the files <-> names in the model, by Transformers' rules
weights.py, tensors.py  weights in memory: the whole model, or tensor by tensor
formats.py            the quantization dictionary, ours and others'
plan.py, writer.py    every tensor's place is known first; then written, then renamed into place
sidecars.py             config.json, tokenizer and the other small files
reader.py             a checkpoint -> QuantizedCheckpoint (checkpoint.py), judged by judge.py
"""
