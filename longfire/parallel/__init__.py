"""One program, many devices. The files in the order of the flow:

axes.py             the axes of a mesh, by name
plan.py             degrees from settings; refuses what is not proven, with the reason
mesh.py             the processes of a run as a box with these axes; sums over some of them
sharding.py         where each parameter lies: its ShardSpec, the slices that a process holds
collectives.py      what crosses between processes in a forward and its backward
tensor.py           matrices, heads and the vocabulary shared
stages.py           which layers lie on which process of a pipeline
pipeline.py         micro-batches through the stages
layout.py           which tokens of a sequence lie on which of the processes that share it
context.py          what a mixer calls to look along a shared sequence: seq.ops
context_strategies/ softmax attention over such processes, a file for each strategy
context_cost.py     what a layer sends where a sequence is cut
cost.py             how long the parts of a step take on a device, here or not
strategy.py         which strategy is best for softmax attention
remat.py            what a block keeps for its backward
apply.py            a model on its devices: tensor, pipeline, remat, compile, shard, in that order
"""
