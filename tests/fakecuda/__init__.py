"""A make-believe CUDA: what the tool does with accelerators, shown without one. See README.md."""
