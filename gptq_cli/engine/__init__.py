"""The block loop: capture what enters the first block; then per block: collect, solve, pack, pass on."""
