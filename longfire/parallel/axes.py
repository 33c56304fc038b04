"""The axes of a mesh, outermost first; torch-free, so that settings can be checked before torch is
imported."""

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
SHARDS = (
    "dp_shard",
    "cp",
)  # axes along which parameters, their gradients and the optimizer are cut
DATA = ("dp_replicate", "dp_shard")  # axes along which sequences differ
