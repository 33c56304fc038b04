"""One program, many devices. The files in the order of the flow:

    axes.py            the axes of a mesh, by name
    plan.py            degrees from settings; refuses what is not proven, with the reason
    mesh.py            the processes of a run as a box with these axes; sums over some of them
    pieces.py          which part of each parameter a process holds
    collectives.py     what crosses between processes in a forward and its backward
    tensor.py          matrices, heads and the vocabulary shared
    stages.py          which layers lie on which process of a pipeline
    pipeline.py        microbatches through the stages
    layout.py          which tokens of a sequence lie on which of the processes that share it
    strategy.py        what crosses where a sequence is cut, and which way is best for softmax
    ring.py            softmax attention over such processes: ring, all-gather, all-to-all
    context.py         what a mixer calls to look along a shared sequence
    remat.py           what a block keeps for its backward
    apply.py           a model on its devices: tensor, pipeline, remat, compile, shard, in that order

`longfire plan`, which needs none of the devices:

    memory.py          what a step holds, from a forward and backward on fake tensors
    holding.py         what a process holds beside its parts
    cost.py            how long the parts of a step take on devices that are not here
    forecast.py        a plan and what is expected of it
    planner.py         plans of a recipe, compared
    tables.py          forecasts as tables and as JSON
    longest.py         the longest sequence that fits, for each mixer
    published.py       Ring Attention's published tables
    context_tables.py  both as tables
"""
