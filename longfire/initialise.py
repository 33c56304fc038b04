"""How every parameter begins: by the rule of its role, keyed by (seed, name, global shape), the
same on every layout."""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor, nn

from longfire.config.init_rules import BY_DEPTH, INITIALIZER_RANGE, MIXERS_BY_DEPTH, check_init
from longfire.config.model_config import PUBLISHED, ModelConfig, mixer_of
from longfire.errors import SettingsError
from longfire.mixers import MIXERS
from longfire.model import Model, on_meta
from longfire.ops.linear import Linear
from longfire.ops.norm import GatedRMSNorm, LayerNorm, RMSNorm
from longfire.ops.short_conv import ShortConv
from longfire.parallel.sharding import copy_from_whole, global_shape, sharding_of

Rule = Callable[[Tensor, torch.Generator], object]  # fills a whole parameter in place


def build(
    config: ModelConfig,
    seed: int,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> Model:
    """A model with fp32 master parameters on `device`, initialised by (seed, name, shape)."""
    return materialise(on_meta(config, compute_dtype), seed, device)


def materialise(model: Model, seed: int, device: torch.device | str) -> Model:
    """Give what is left of the model here its memory and its first values."""
    model.to_empty(device=device)
    model.tie()
    initialise(model, seed)
    return model


def initialise(model: Model, seed: int) -> None:
    """Give every parameter its first value, keyed by (seed, name, global shape) and drawn on the
    CPU.

    Each is drawn whole, since rules look at the whole shape, and the part that this process holds
    (split, sharded) is kept. A parameter that its mixer names in `own_init` begins by that rule,
    every other one by its role (`role_of`); a buffer without such a rule is zero. Raises
    AssertionError naming a parameter without a role, SettingsError for rules of the config that are
    wrong.
    """
    check_init(model.config)
    visited: set[nn.Parameter] = set()
    own = own_rules(model)
    published = published_rules(model)
    outputs = output_weights(model)
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter in visited:
                continue  # a tied head begins as the embedding
            name = f"{module_name}.{leaf}"
            spec = sharding_of(model, name)
            generator = keyed_generator(seed, name)
            first = torch.empty(global_shape(parameter, spec), dtype=torch.float32)
            rule = own.get(name) or rule_of(
                role_of(name, module, outputs), model.config, published.get(name)
            )
            with torch.no_grad():
                rule(first, generator)
                copy_from_whole(parameter, spec, first)
            visited.add(parameter)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            own.get(name, zeros)(buffer, keyed_generator(seed, name))
    unvisited = [name for name, parameter in model.named_parameters() if parameter not in visited]
    assert not unvisited, f"no initialiser visited {unvisited}"


def own_rules(model: Model) -> dict[str, Rule]:
    """Parameter -> the rule that its mixer (or another module with `own_init`) brings."""
    found: dict[str, Rule] = {}
    for module_name, module in model.named_modules():
        for leaf, rule in getattr(module, "own_init", {}).items():
            found[f"{module_name}.{leaf}"] = rule
    return found


def published_rules(model: Model) -> dict[str, Rule]:
    """Parameter -> how it begins in the model that its mixer was published with.

    Of embedding and head only where all layers have that mixer: a hybrid is another model.
    """
    rules = {}
    for module_name, module in model.named_modules():
        for leaf, rule in getattr(module, "published_init", {}).items():
            rules[f"{module_name}.{leaf}"] = rule
    mixers = {mixer_of(name) for name in model.config.layer_types}
    if len(mixers) == 1:
        rules |= MIXERS[mixers.pop()].published_ends(model.config)
    return rules


def output_weights(model: Model) -> set[str]:
    """Names of the matrices that end a mixer or an MLP: those whose tensor-parallel role is "row".
    Of mixers alone where `init_outputs` is about them: an MLP's are then matrices like others.

    Raises SettingsError where `init_outputs` asks for them and a mixer does not say which they are.
    """
    found = set()
    parts = (".mixer",) if model.config.init_outputs == MIXERS_BY_DEPTH else (".mixer", ".mlp")
    for name, module in model.named_modules():
        if not name.endswith(parts):
            continue
        ends = [leaf for leaf, role in getattr(module, "roles", {}).items() if role == "row"]
        found |= {f"{name}.{leaf}.weight" for leaf in ends}
        if not ends and model.config.init_outputs != PUBLISHED:
            raise SettingsError(
                f"model config: init_outputs = {model.config.init_outputs!r}, but "
                f"{type(module).__name__} "
                'does not say which matrix ends it: give its `roles` an entry "row"'
            )
    return found


def role_of(name: str, module: nn.Module, outputs: set[str]) -> str:
    """What a parameter is for, by its name and the module that owns it: norm, bias, or what an
    `init_*` key names."""
    leaf = name.rpartition(".")[2]
    if leaf == "bias":
        return "bias"
    if leaf == "weight" and isinstance(module, RMSNorm | LayerNorm | GatedRMSNorm):
        return "norm"
    if leaf == "weight" and isinstance(module, nn.Embedding):
        return "embedding"
    if leaf == "weight" and isinstance(module, Linear | ShortConv):
        if name == "head.weight":
            return "head"
        if name in outputs:
            return "outputs"
        return "matrices"
    raise AssertionError(
        f"{name} of {type(module).__name__} has no role: add it to own_init of its mixer"
    )


def rule_of(role: str, config: ModelConfig, published: Rule | None = None) -> Rule:
    """How parameters of a role begin: norms 1, biases 0, weights as `init_<role>` of the shape
    says.

    published: the rule of a parameter whose mixer was published with one of its own.
    """
    if role == "norm":
        return lambda tensor, generator: tensor.fill_(1.0)
    if role == "bias":
        return zeros
    wanted = getattr(config, f"init_{role}")
    if wanted == PUBLISHED and published is not None:
        return published
    if wanted in (PUBLISHED, INITIALIZER_RANGE):
        return normal(config.initializer_range)
    if wanted in (BY_DEPTH, MIXERS_BY_DEPTH):
        return normal(config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)
    if isinstance(wanted, str):
        return NAMED_RULES[wanted]
    return normal(wanted)


def normal(std: float) -> Rule:
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def zeros(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.zero_()


def fan_in_normal(weight: Tensor, generator: torch.Generator) -> None:
    """N(0, 1/fan_in): outputs have the variance of the inputs (LeCun 1998)."""
    weight.normal_(0.0, fan_in(weight) ** -0.5, generator=generator)


def fan_in_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """Uniform with the same standard deviation, 1/sqrt(fan_in): the bound is sqrt(3/fan_in)."""
    bound = (3 / fan_in(weight)) ** 0.5
    weight.uniform_(-bound, bound, generator=generator)


def fan_in(weight: Tensor) -> int:
    """Inputs of one output: columns of a matrix, taps of a short convolution, hidden size of an
    embedding."""
    return weight[0].numel()


# The names that INIT_RULES allows beside those that need a number of the shape.
NAMED_RULES: dict[str, Rule] = {
    "fan_in": fan_in_normal,
    "fan_in_uniform": fan_in_uniform,
    "zeros": zeros,
}


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the seed and the parameter's name only."""
    digest = blake2b(f"{seed}|{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
