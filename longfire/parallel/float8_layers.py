"""Which matrices of a model multiply 8-bit numbers (settings in [float8]), chosen by role; what of
that is refused.

Chosen are matrices of mixers and MLPs whose role says that tensor parallelism splits them, if both
sizes are multiples of 16. Left out are the head, embeddings and patches; matrices that every
process has whole ("replicate": gates of low rank, maps of features), whose gradient is a part in
each process, which cannot be rounded before it is summed; and those that a setting names. The
choice is made of the whole model, so that it is the same under every plan.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from longfire.config import settings
from longfire.ops.float8 import MULTIPLE, RECIPES, Dim, Float8, Highest
from longfire.ops.linear import Linear
from longfire.parallel.collectives import highest, known_as
from longfire.parallel.mesh import Mesh

if TYPE_CHECKING:
    from longfire.model import Model

# Role -> the dim of the weight that tensor parallelism splits
SPLIT_DIMS: dict[str, Dim] = {
    "column": "outputs",
    "kv_head": "outputs",
    "head": "outputs",
    "halves": "outputs",
    "row": "inputs",
    "inner_row": "inputs",
}
# torchtitan's and transformers', for words of a filter; here it is left out in any case
NAMES_OF_HEAD = ("output", "lm_head")
AUTO_FILTER = "auto_filter_small_kn"


@dataclass
class Float8Choice:
    """chosen: name of a matrix -> its role. left_out: name -> the reason."""

    chosen: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def describe(self, float8: settings.Float8) -> str:
        """How many matrices multiply 8-bit numbers, by role, and how many do not, by reason."""
        roles = by_count(self.chosen)
        reasons = by_count(self.left_out)
        how = f"{float8.recipe_name}, by float8 units"
        if float8.emulate:
            how = f"{float8.recipe_name}, emulated: 8-bit numbers are multiplied in fp32"
        return (
            f"{len(self.chosen)} of {len(self.chosen) + len(self.left_out)} matrices ({how}): "
            f"{roles}; others: {reasons}"
        )


def by_count(words: dict[str, str]) -> str:
    """Each value and how often it is there, the most frequent first."""
    counted = Counter(words.values()).most_common()
    return ", ".join(f"{count} {word}" for word, count in counted)


def choose_matrices(model: "Model", float8: settings.Float8) -> Float8Choice:
    """The matrices of a whole model, before anything is split."""
    choice = Float8Choice()
    if not float8.enable_float8_linear:
        return choice
    roles = roles_of_matrices(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = why_left_out(name, module, roles.get(name, ""), float8)
        if reason:
            choice.left_out[name] = reason
        else:
            choice.chosen[name] = roles[name]
    return choice


def roles_of_matrices(model: "Model") -> dict[str, str]:
    """Name of a matrix of a mixer or an MLP -> its role, as the region declares it."""
    roles: dict[str, str] = {}
    for layer, block in model.layers.numbered():
        for part, region in (("mixer", block.mixer), ("mlp", block.mlp)):
            if region is None:
                continue
            for name, module in region.named_modules():
                role = role_of(name, region.roles)
                if isinstance(module, nn.Linear) and role:
                    roles[f"layers.{layer}.{part}.{name}"] = role
    return roles


def role_of(name: str, roles: dict[str, str]) -> str:
    """The role of a module inside its region; empty where none is declared."""
    for declared, role in roles.items():
        if name == declared or name.startswith(f"{declared}."):
            return role
    return ""


def why_left_out(name: str, module: nn.Linear, role: str, float8: settings.Float8) -> str:
    """Why a matrix keeps the compute type; empty where it does not."""
    if name == "head":
        return "head"
    if role not in SPLIT_DIMS:
        return role or "without a role"
    if any(word in name for word in float8.filter_fqns):
        return "named by float8.filter_fqns"
    if type(module) is not Linear:
        return "with a product of its own"
    if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
        return f"of a size that is no multiple of {MULTIPLE}"
    return ""


def set_float8(
    model: "Model",
    choice: Float8Choice,
    float8: settings.Float8,
    mesh: Mesh,
) -> None:
    """Let the chosen matrices multiply 8-bit numbers, after tensor parallelism has split them: what
    processes share, a matrix or the tokens of a sequence, has one scale."""
    for name, role in choice.chosen.items():
        module = model.get_submodule(name)
        assert isinstance(module, Linear), f"{name} was chosen"
        shared: dict[Dim, Highest] = {}
        if mesh.size("tp") > 1:
            shared[SPLIT_DIMS[role]] = partial(highest, group=known_as(mesh.group("tp")))
        if mesh.size("cp") > 1:
            shared["tokens"] = partial(highest, group=known_as(mesh.group("cp")))
        module.float8 = Float8(RECIPES[float8.recipe_name], float8.emulate, shared)


def refusals(model: "Model", float8: settings.Float8, tp: int) -> Iterator[str]:
    """What of the settings cannot be done with this whole model (on meta), with the fix."""
    choice = choose_matrices(model, float8)
    names = [*choice.chosen, *choice.left_out, *NAMES_OF_HEAD]
    for word in float8.filter_fqns:
        if word == AUTO_FILTER:
            yield (
                f"float8.filter_fqns = {word!r} leaves out what was slower on devices that nobody "
                "has measured here: name the matrices instead, as mlp.down_proj"
            )
        elif not any(word in name for name in names):
            yield (
                f"float8.filter_fqns: no matrix has {word!r} in its name: write a part of one, as "
                f"of {names[0]}"
            )
    if not choice.chosen:
        yield (
            "float8.enable_float8_linear = true, but no matrix of this model can multiply 8-bit "
            f"numbers ({by_count(choice.left_out)}): set it to false"
        )
    for size, role in sorted(sizes_that_are_split(model, choice)):
        if size % (tp * MULTIPLE):
            yield (
                f"parallelism.tensor_parallel_degree = {tp} leaves {size / tp:g} of the {size} "
                f"channels of a {role} matrix to a process, but float8 needs multiples of "
                f"{MULTIPLE}: lower the degree, or name such matrices in float8.filter_fqns"
            )


def sizes_that_are_split(model: "Model", choice: Float8Choice) -> set[tuple[int, str]]:
    """Of the chosen matrices, the sizes that tensor parallelism divides, with the role."""
    sizes: set[tuple[int, str]] = set()
    for name, role in choice.chosen.items():
        outputs, inputs = model.get_submodule(name).get_parameter("weight").shape
        sizes.add((outputs if SPLIT_DIMS[role] == "outputs" else inputs, role))
    return sizes
