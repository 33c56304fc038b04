"""One program, many devices.

plan.py    which layouts this model supports; refuses the others with the reason
stages.py, pipeline.py   which layers lie where; microbatches that pass through them as a schedule says
apply.py   THE function: one model -> tensor -> context -> remat -> compile -> shard, in that order
"""
