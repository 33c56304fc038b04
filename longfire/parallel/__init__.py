"""One program, many devices. The files in the order of the flow:

axes.py              the axes of a mesh, by name
plan.py              degrees from settings; refuses what is not proven, with the reason
mesh.py              the processes of a run as a box with these axes; sums over some of them
sharding.py          where each parameter is: its ShardSpec, the slices that a process holds
collectives.py       what crosses between processes in a forward and its backward
autograd_context.py  types of what a forward leaves for its backward
tensor_group.py      the processes that share each matrix, and the ways between them
tensor_roles.py      which parameters mixers and MLPs declare to be split, and how
tensor_modules.py    modules that stand in the place of a layer's own
tensor.py            matrices, heads and the vocabulary shared
float8_layers.py     which matrices multiply 8-bit numbers
tensor_refusals.py   what of a run cannot be shared so, and why
stages.py            which layers are on which process of a pipeline
pipeline_stage.py    some layers of a model, and what they take from those before
pipeline_loss.py     a micro-batch's loss, with gradients that are made at once
pipeline_schedule.py torch's schedules and stages, made for ours
pipeline.py          micro-batches through the stages
layout.py            which tokens of a sequence are on which of the processes that share it
context_exchange.py  what crosses the cuts of a sequence for states and last inputs
context.py           what a mixer calls to look along a shared sequence: seq.ops
context_strategies/  softmax attention over such processes, a file for each strategy
context_cost.py      what a layer sends where a sequence is cut
context_refusals.py  what of a run cannot be shared along the sequence, and why
cost.py              how long the parts of a step take on a device, here or not
strategy.py          which strategy is best for softmax attention
remat.py             what a block keeps for its backward
activation_offload.py  what waits in the host's memory
parameter_gather.py  sharded matrices travel in the type that they are multiplied in
apply.py             a model on its devices: tensor, pipeline, remat, compile, shard, in that order
"""
