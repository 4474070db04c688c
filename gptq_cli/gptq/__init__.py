"""The maths of GPTQ: tensors in, tensors out, torch only.

Read it in the order of the data.

    hessian.py    activations -> H, the mean of x xᵀ; and C, the cross moment of two streams
    target.py     H, C -> W', what the quantized inputs should be multiplied with (optional)
    moments.py    the two of them for one stage: samples -> H and W'
    factor.py     H -> R, one damped Cholesky factor in solving order
    grid.py       what a code can say: levels, scales that survive float16, round-to-nearest
    search.py     W -> the scale and the zero of every group
    loop.py       W, R -> codes: the loop of the paper
    refine.py     codes, scales -> better codes, better scales
    quality.py    the losses that are reported
    solver.py     the story of all that, for the linears of a stage: `quantize_linears` is the way in
    packing.py    codes -> the int32 words of the checkpoint, and back

Paper: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (arXiv 2210.17323). W, H, Q, E, U and B are its letters. Inside the solver
tensors lie transposed, (K, N): one input column of the paper is one contiguous row, so that the loop over
columns streams memory.
"""
