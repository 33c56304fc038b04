"""Any causal language model of transformers, as it is: their class with the interface of our model,
for what our own parts cannot express.

Everything around the model is ours (data, loss per token, optimizer, checkpoints, evaluation,
generation, export), the forward is theirs. So a new architecture trains before it has a mixer here,
and a user's own class too, once a plugin has registered it (in a file of model.plugins):

    AutoConfig.register("mine", MyConfig)
    AutoModelForCausalLM.register(MyConfig, MyModel)

It does not have: the fused loss (it returns logits), kernels of ours, plans that need the parts of
a model (they are refused, with the reason), generation from a cache (each token is a forward over
all tokens before it).
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longfire.config.transformers_config import TransformersConfig
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.comparing import quiet_transformers
from longfire.huggingface.family import Config
from longfire.mixers.cache import Cache
from longfire.mixers.mixer import Sequence

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NAMES_SHOWN = 3  # names that a message lists


class TransformersModel(nn.Module):
    """Their model with the interface of ours. `head` is None: forward returns logits."""

    theirs: "PreTrainedModel"
    head = None
    pipeline = None
    context = None
    computes_on: torch.device | None = None

    def __init__(
        self,
        model_config: TransformersConfig,
        theirs: "PreTrainedModel",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = model_config
        self.theirs = theirs
        self.compute_dtype = compute_dtype
        parameters = inspect.signature(theirs.forward).parameters
        has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.takes_positions = "position_ids" in parameters
        self.takes_use_cache = "use_cache" in parameters or has_kwargs
        # fla's, a part of their loss
        self.use_l2warp = bool(getattr(theirs.config, "use_l2warp", False))

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """What is compiled: all of it, since its parts are not known."""
        return (self.theirs,)

    @property
    def embed(self) -> nn.Module:
        return self.theirs.get_input_embeddings()

    @property
    def embed_weight(self) -> nn.Parameter:
        """(V, D)"""
        weight = self.embed.weight
        assert isinstance(weight, nn.Parameter), "an embedding"
        return weight

    @property
    def head_weight(self) -> nn.Parameter | None:
        """(V, D); None where their class has no head of its own."""
        output = self.theirs.get_output_embeddings()
        if output is None:
            return None
        weight = output.weight
        assert isinstance(weight, nn.Parameter), "a linear layer"
        return weight

    def forward(
        self,
        ids_BT: Tensor,
        seq: Sequence | None = None,
    ) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V). Their dropout is active where gradients are
        computed."""
        self.theirs.train(torch.is_grad_enabled())
        if seq is not None and seq.cache is not None:
            return self.continued(ids_BT, seq.cache)
        positions_BT = None
        if seq is not None and seq.documents is not None and self.takes_positions:
            positions_BT = seq.positions_BT
        with self.precision(ids_BT.device):
            return self.call(ids_BT, positions_BT)

    def call(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Their forward -> logits (B, T, V)."""
        arguments: dict[str, object] = {}
        if positions_BT is not None:
            arguments["position_ids"] = positions_BT
        if self.takes_use_cache:
            arguments["use_cache"] = False
        output = self.theirs(ids_BT, **arguments)
        if hasattr(output, "logits"):
            return output.logits
        return output[0]

    def continued(self, ids_BT: Tensor, cache: Cache) -> Tensor:
        """Logits of new ids after those in the cache, which keeps only the ids: each sequence is a
        forward over all of its ids."""
        kept = cache.layers[0]
        # (B, T, 1, 1), as the cache has keys: shorter sequences are padded on the left
        new = ids_BT[..., None, None]
        kept["k"] = torch.cat([kept["k"], new], 1) if "k" in kept else new
        starts = [0] * len(ids_BT)
        if cache.padding_B is not None:
            starts = cache.padding_B.tolist()
        logits = []
        for ids_T11, start in zip(kept["k"], starts):
            all_logits_1TV = self(ids_T11[None, start:, 0, 0])
            logits.append(all_logits_1TV[:, -ids_BT.shape[1] :])
        cache.length += ids_BT.shape[1]
        return torch.cat(logits)

    def precision(self, device: torch.device) -> AbstractContextManager:
        """Parameters are fp32 masters; in another compute type their products run under torch's
        autocast."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.compute_dtype)

    def logits(self, hidden_BTV: Tensor) -> Tensor:
        return hidden_BTV.float()

    def flops_per_token(self, seq_len: int) -> float:
        """By the number of parameters: 2 for each that is multiplied by, which an embedding is not
        and a tied head is. The work of attention beyond its matrices, and which experts a token
        passes, are not known from outside."""
        matrices = {parameter for parameter in self.theirs.parameters() if parameter.dim() >= 2}
        numbers = sum(matrix.numel() for matrix in matrices)
        if self.head_weight is not self.embed_weight:
            numbers -= self.embed_weight.numel()
        return 2 * numbers


def build(
    model_config: TransformersConfig,
    seed: int,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> TransformersModel:
    """Their model in fp32, initialised by their own code under our seed. Raises SettingsError when
    it cannot be made."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        try:
            theirs = AutoModelForCausalLM.from_config(
                config_of(model_config.config),
                dtype=torch.float32,
                trust_remote_code=False,
            )
        except Exception as error:
            raise SettingsError(
                f"model.config: transformers cannot make a {model_config.model_type} model of it: "
                f"{first_lines(error)}"
            ) from error
    check_buffers(theirs)
    return TransformersModel(model_config, theirs.float().to(device), compute_dtype)


def model_of(
    model_config: TransformersConfig,
    weights: dict[str, Tensor],
    device: torch.device | str,
    compute_dtype: torch.dtype,
) -> TransformersModel:
    """Their model with the parameters of a checkpoint. Raises CheckpointError when they are another
    model's."""
    model = build(model_config, 0, "cpu", compute_dtype)
    parameters = dict(model.named_parameters())
    differ = sorted(parameters.keys() ^ weights.keys())
    if differ:
        raise CheckpointError(
            f"the checkpoint is of another model than {model_config.model_type}: "
            f"{', '.join(differ[:NAMES_SHOWN])}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model.to(device)


def dropouts(model_config: TransformersConfig) -> dict[str, float]:
    """The settings of dropout in their model that are not 0, by name."""
    found = {}
    for key, value in config_of(model_config.config).to_dict().items():
        if "drop" in key and isinstance(value, float) and value > 0:
            found[key] = value
    return found


def read_model_config(config: Config, where: str) -> TransformersConfig:
    """The model config in a config.json that transformers, or a class that a plugin registered,
    understands. Raises SettingsError."""
    theirs = config_of(config, where)
    sizes: dict[str, int] = {}
    missing = []
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        value = getattr(theirs, name, None)
        if type(value) is int:
            sizes[name] = value
        else:
            missing.append(name)
    if missing:
        raise SettingsError(
            f"{where}: its class does not have {', '.join(missing)}, which a causal language model "
            "needs"
        )
    limit = getattr(theirs, "max_position_embeddings", 0) or 0
    return TransformersConfig(config, **sizes, max_position_embeddings=limit)


def config_of(config: Config, where: str = "model.config") -> "PretrainedConfig":
    """The object that transformers makes of a config.json. Raises SettingsError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**with_infinities(config))
    except Exception as error:  # every class has validators of its own
        raise SettingsError(
            f"{where}: transformers cannot read it ({first_lines(error)}); model.backend = "
            "'transformers' takes the model types that transformers knows, and those that a file "
            "of model.plugins registers with AutoConfig and AutoModelForCausalLM"
        ) from error


def with_infinities(config: Config) -> Config:
    """A config.json, or a table in it, with transformers' {"__float__": "Infinity"} as the number
    that it means; JSON has none."""
    return {name: with_infinity(value) for name, value in config.items()}


def with_infinity(value: object) -> object:
    """The same for any part of a config.json."""
    if isinstance(value, list):
        return [with_infinity(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return with_infinities(value)


def first_lines(error: Exception) -> str:
    """The first two lines of a message."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])


def check_buffers(theirs: nn.Module) -> None:
    """Raises SettingsError for a class with saved buffers: a checkpoint holds parameters only, and
    a buffer that training changes would be lost."""
    saved = theirs.state_dict()
    buffers = [name for name, _ in theirs.named_buffers() if name in saved]
    if buffers:
        raise SettingsError(
            f"model.backend = 'transformers': {type(theirs).__name__} keeps state beside its "
            f"parameters ({', '.join(buffers[:NAMES_SHOWN])}), which our checkpoints do not hold"
        )
