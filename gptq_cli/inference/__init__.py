"""Running a quantized checkpoint, and proving that it works.

codes.py          packed checkpoint tensors of one linear -> codes, scales, zeros in solved order
kernels.py        how a device holds codes, and multiplies by them
crossover.py      up to how many tokens the fused kernel beats dequantize-and-GEMM, measured at load
packed_linear.py  the module that replaces a linear; experts.py the one that replaces fused experts
opening.py        checkpoint + placement -> a Transformers model ready for `generate`
planes.py         the codes as every kernel wants them: four bits, padded, groups of a legal size
generation.py     prompt -> text
perplexity.py     windows -> perplexity; agreement.py  KL to the dense model
verify.py         every tensor of a checkpoint judged;  targets.py  will that reader take it
"""
