"""Several processes, the *ranks* of one run, that torchrun started: who they are, how they agree, how they
add up, and how they notice that one of them is gone.

    launch     what torchrun says in the environment
    leaves     how samples, rows and experts are shared out: plain numbers
    tree       sums in an order that does not depend on the number of ranks
    team       what the engine asks of the ranks; `Alone`, of which every operation is the identity
    channel    bytes of rank 0 for ranks that do not see its files
    group      the same over torch.distributed
    watch      heartbeats: a rank that is gone, or stuck, ends all of them
    waits      what is said while others are waited for
    joining    from a launch to a team
"""
