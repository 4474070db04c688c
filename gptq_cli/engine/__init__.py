"""The block loop: capture what enters the first block, then block by block collect, solve, pack and pass on.

capture.py   the hidden states that enter the first block, and the arguments every block is called with
stages.py    which linears of a block read the same input, found by running one sample
residuals.py what the output of a linear is added to, found in the same way
forwards.py  bring every micro-batch to a stage: parked (each linear runs once) or replayed (least memory)
loop.py      the story: for each block, for each stage, Hessian -> codes -> checkpoint
finite.py    which sample brought NaN or infinity
run.py       the model opened by its placement, handed to the loop
summary.py   what the run was like: the report
"""
