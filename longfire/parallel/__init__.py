"""One program, many devices.

plan.py    which layouts this model supports; refuses the others with the reason
apply.py   THE function: one model -> tensor -> context -> remat -> compile -> shard, in that order
"""
