"""Norms of each parameter, of its gradient and of its update (metrics.norms_freq), the same under
every plan as on one process."""

from collections.abc import Iterator

import torch
from torch import Tensor

from longfire.model import Model
from longfire.parallel.mesh import Mesh
from longfire.parallel.sharding import ShardSpec, placed_parameters
from longfire.row_shards import local

# Sums of squares: of a parameter before the step, its gradient before clipping, its update
Squares = list[float]


class Norms:
    """Begun before an update with complete gradients, which are not clipped yet; `numbers` after
    it. Holds a copy of the parameters of this process meanwhile."""

    def __init__(self, model: Model, mesh: Mesh) -> None:
        self.model = model
        self.mesh = mesh
        self.before: dict[str, Tensor] = {}
        self.squares: dict[str, list[Tensor]] = {}
        for name, parameter, _ in learning(model):
            here = local(parameter).detach()
            self.before[name] = here.clone()
            gradient = torch.zeros(()) if parameter.grad is None else local(parameter.grad)
            self.squares[name] = [square(here), square(gradient).to(here.device)]

    def numbers(self) -> dict[str, float]:
        """param_norm and update_norm (grad_norm is in every record), and norms/param/<name>,
        norms/grad/<name>, norms/update/<name>. Collective."""
        found: dict[str, Squares] = {}
        for name, parameter, spec in learning(self.model):
            moved = local(parameter).detach() - self.before.pop(name)
            of_parameter = torch.stack([*self.squares.pop(name), square(moved)])
            found[name] = (of_parameter * self.share(spec)).tolist()
        total: dict[str, Squares] = {}
        for of_process in self.mesh.all_gather_object(found):
            for name, squares in of_process.items():
                known = total.get(name, [0.0, 0.0, 0.0])
                total[name] = [a + b for a, b in zip(known, squares)]
        numbers = {
            "param_norm": sum(squares[0] for squares in total.values()) ** 0.5,
            "update_norm": sum(squares[2] for squares in total.values()) ** 0.5,
        }
        for name, squares in total.items():
            for what, of_one in zip(("param", "grad", "update"), squares):
                numbers[f"norms/{what}/{name}"] = of_one**0.5
        return numbers

    def share(self, spec: ShardSpec) -> float:
        """How much of a number counts here, of those that several processes hold."""
        if spec.is_copy:
            return 0.0
        replicas = self.mesh.size("dp_replicate")
        return 1 / (replicas if spec.split else replicas * self.mesh.size("tp"))


def learning(model: Model) -> Iterator[tuple[str, Tensor, ShardSpec]]:
    """Name, parameter and place of what learns, as on one process: without the names that wrappers
    add."""
    for name, parameter, spec in placed_parameters(model):
        if parameter.requires_grad:
            yield name, parameter, spec


def square(tensor: Tensor) -> Tensor:
    """The squared 2-norm, in float64."""
    return torch.linalg.vector_norm(tensor).double().square()
