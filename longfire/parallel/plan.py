"""Which layouts a run may have: refuses what no test proves, with the reason, before a device is touched."""

from longfire.errors import SettingsError
from longfire.settings import Parallelism

# degree -> what it would do; each stays refused until its gradients are proven equal to one process's (design, promise 3)
DEGREES = {
    "data_parallel_replicate_degree": "replicas of the model",
    "data_parallel_shard_degree": "sharded parameters",
    "tensor_parallel_degree": "tensor parallel",
    "pipeline_parallel_degree": "pipeline parallel",
    "context_parallel_degree": "context parallel",
}


def check_plan(parallelism: Parallelism) -> None:
    """Raises SettingsError naming the degree that this version cannot run."""
    for name, what in DEGREES.items():
        degree = getattr(parallelism, name)
        if degree not in (1, -1):
            raise SettingsError(
                f"parallelism.{name} = {degree} ({what}) is not supported yet: this version runs one process; "
                f"set it to 1"
            )
