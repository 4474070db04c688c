"""The maths of GPTQ: tensors in, tensors out, torch only.

`solver.quantize_linears` is the way in: all the linears of a stage at once.

Paper: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (arXiv 2210.17323). W, H, Q, E, U and B are its letters. Inside the solver
tensors are transposed, (K, N): one input column of the paper is one contiguous row, so that the loop over
columns reads memory in order.
"""
