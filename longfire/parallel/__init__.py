"""One program, many devices.

axes.py         the axes of a mesh, by name
plan.py         degrees from settings; refuses what is not proven, with the reason
mesh.py         the processes of a run as a box with these axes; what they say to each other
apply.py        THE function: one model -> tensor -> pipeline -> remat -> compile -> shard, in that order
remat.py        what a block keeps for its backward: which attention, chunks, recomputation, host memory
tensor.py       matrices, heads and words shared; collectives.py: the ways between those who share, and back for gradients
stages.py       which layers go where; pipeline.py: microbatches through them
pieces.py       which part of each parameter a process holds
"""
