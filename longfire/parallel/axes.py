"""The axes of a mesh, outermost first; torch-free, so that settings can be checked before torch is imported."""

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DATA = ("dp_replicate", "dp_shard")  # axes along which rows differ
