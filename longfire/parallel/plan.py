"""Which layouts a run may have: degrees from settings, checked before a device is touched."""

from math import prod

from longfire.config.settings import Parallelism
from longfire.errors import SettingsError
from longfire.parallel.axes import AXES

DEGREES = {
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
}
MESH_DIM = ("dp_replicate", "dp_shard", "tp", "cp")  # the order of parallelism.mesh_dim


def resolve_degrees(parallelism: Parallelism, processes: int) -> dict[str, int]:
    """Processes along each axis, by axis; at most one may be -1, for those that remain. Raises
    SettingsError naming the key."""
    given = {axis: getattr(parallelism, key) for axis, key in DEGREES.items()}
    if parallelism.mesh_dim:
        given |= of_mesh_dim(parallelism)
    open_axes = [axis for axis, degree in given.items() if degree == -1]
    degrees_text = ", ".join(f"{DEGREES[axis]} = {given[axis]}" for axis in DEGREES)
    if len(open_axes) > 1 or any(degree < 1 and degree != -1 for degree in given.values()):
        raise SettingsError(
            f"parallelism: {degrees_text}: at most one degree may be -1 (the processes that "
            "remain), none below it or 0"
        )
    fixed = prod(degree for degree in given.values() if degree != -1)
    if open_axes:
        given[open_axes[0]] = processes // fixed
    if prod(given.values()) != processes:
        if open_axes:
            fix = f"start a multiple of {fixed}"
        else:
            fix = f"start {fixed}, or set data_parallel_shard_degree = -1"
        raise SettingsError(
            f"parallelism: {degrees_text} do not make up the {processes} process(es) that run: "
            f"{fix}"
        )
    return {axis: given[axis] for axis in AXES}


def of_mesh_dim(parallelism: Parallelism) -> dict[str, int]:
    """The degrees that mesh_dim says in one word. Raises SettingsError if a degree is given
    in both ways."""
    try:
        numbers = [int(word) for word in parallelism.mesh_dim.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(MESH_DIM):
        raise SettingsError(
            f"parallelism.mesh_dim = {parallelism.mesh_dim!r} must be four numbers, "
            "replicas,shards,tensor,context, as 1,64,4,1"
        )
    plain = Parallelism()
    for axis in MESH_DIM:
        if getattr(parallelism, DEGREES[axis]) != getattr(plain, DEGREES[axis]):
            raise SettingsError(
                f"parallelism.mesh_dim and parallelism.{DEGREES[axis]} say the same: leave one of "
                "them out"
            )
    return dict(zip(MESH_DIM, numbers))


def reshards(parallelism: Parallelism, pp: int, shards: int) -> bool:
    """Whether a gathered block is given back between its forward and its backward
    (reshard_after_forward). shards: processes that parameters are cut over, along dp_shard and
    cp."""
    asked = parallelism.reshard_after_forward
    comes_from_elsewhere = shards > 1 or parallelism.cpu_offload
    return asked == "always" or (asked == "auto" and pp == 1 and comes_from_elsewhere)
