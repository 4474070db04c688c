"""Running a quantized checkpoint: the packed linear and its kernels."""
