"""One program, many devices. The files in the order of the flow:

axes.py         the axes of a mesh, by name
plan.py         degrees from settings; refuses what is not proven, with the reason
mesh.py         the processes of a run as a box with these axes; sums over some of them
sharding.py     which part of each parameter a process holds
collectives.py  what crosses between processes in a forward and its backward
tensor.py       matrices, heads and the vocabulary shared
stages.py       which layers lie on which process of a pipeline
pipeline.py     microbatches through the stages
layout.py       which tokens of a sequence lie on which of the processes that share it
cost.py         how long the parts of a step take on a device, here or not
strategy.py     what crosses where a sequence is cut, and which way is best for softmax
ring.py         softmax attention over such processes: ring, all-gather, all-to-all
context.py      what a mixer calls to look along a shared sequence
remat.py        what a block keeps for its backward
apply.py        a model on its devices: tensor, pipeline, remat, compile, shard, in that order
"""
