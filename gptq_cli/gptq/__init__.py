"""The maths of GPTQ: tensors in, tensors out, torch only.

In the order of the data: `hessian`, `goal`, `moments`, `factor`, `grid`, `search`, `columns`, `refine`,
`losses`, `solver` (`quantize_linears`, the entry point, applies all of them to a stage), `packing`.

Paper: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (arXiv 2210.17323). W, H, Q, E, U and B are its letters. Inside the solver
tensors are transposed, (K, N): one input column of the paper is one contiguous row, so that the loop over
columns reads memory in order.
"""
