"""Any causal language model of transformers, as it is: their class behind our model's face, for
what our own parts cannot say.

Everything around the model is ours (data, loss per token, optimizer, checkpoints, evaluation,
generation, export), the forward is theirs. So a new architecture trains before it has a mixer here,
and a user's own class too, once a plugin has registered it:

    AutoConfig.register("mine", MyConfig); AutoModelForCausalLM.register(MyConfig, MyModel)     # in a file of model.plugins

What it does not have: the fused loss (logits are whole), kernels of ours, plans that look inside
(they are refused, with the reason), generation from a cache (each token is a forward over all
before it).
"""

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longfire.config.model_config import TransformersConfig
from longfire.errors import CheckpointError, SettingsError
from longfire.huggingface.check import (
    Check,
    ids_for,
    kl,
    quiet_transformers,
    refuse_other_bytes,
    refuse_unless,
    tolerated_kl,
)
from longfire.mixers.mixer import Sequence

APART = 1e-4  # of the largest logit: what fp32 may differ by between a packed document and the same alone


class TransformersModel(nn.Module):
    """Their model with our model's face. `head` is None: what forward gives are logits."""

    head = None
    pipeline = context = None
    computes_on: torch.device | None = None

    def __init__(
        self,
        model_config: TransformersConfig,
        theirs: nn.Module,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.theirs, self.compute_dtype = model_config, theirs, compute_dtype
        takes = inspect.signature(theirs.forward).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        self.takes_positions = "position_ids" in takes
        self.use_l2warp = bool(
            getattr(theirs.config, "use_l2warp", False)
        )  # fla's, a part of their loss
        self.without_cache = {"use_cache": False} if "use_cache" in takes or anything else {}

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """What is compiled: all of it, since nothing is known of its parts."""
        return (self.theirs,)

    @property
    def embed(self) -> nn.Module:
        return self.theirs.get_input_embeddings()

    @property
    def head_weight(self) -> nn.Parameter | None:
        output = self.theirs.get_output_embeddings()
        return None if output is None else output.weight

    def forward(self, ids_BT: Tensor, seq: Sequence | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, W). Their dropout is at work where gradients are asked
        for."""
        self.theirs.train(torch.is_grad_enabled())
        if seq is not None and seq.cache is not None:
            return self.continued(ids_BT, seq)
        packed = seq is not None and seq.documents is not None
        positions = {"position_ids": seq.positions_BT} if packed and self.takes_positions else {}
        with self.precision(ids_BT.device):
            out = self.theirs(ids_BT, **positions, **self.without_cache)
        return out.logits if hasattr(out, "logits") else out[0]

    def continued(self, ids_BT: Tensor, seq: Sequence) -> Tensor:
        """Logits of new ids behind those in the cache, which keeps the ids alone: each row is a
        forward over all of it."""
        kept = seq.cache.layers[0]
        new = ids_BT[
            ..., None, None
        ]  # (B, T, 1, 1), as the cache has keys: rows of other lengths are padded on the left
        kept["k"] = torch.cat([kept["k"], new], 1) if "k" in kept else new
        padding = (
            seq.cache.padding_B.tolist() if seq.cache.padding_B is not None else [0] * len(ids_BT)
        )
        rows = [
            self(row[None, start:, 0, 0])[:, -ids_BT.shape[1] :]
            for row, start in zip(kept["k"], padding)
        ]
        seq.cache.length += ids_BT.shape[1]
        return torch.cat(rows)

    def precision(self, device: torch.device) -> AbstractContextManager:
        """Parameters are fp32 masters; in another compute type their products run under torch's
        autocast."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.compute_dtype)

    def logits(self, hidden_BTW: Tensor) -> Tensor:
        return hidden_BTW.float()

    def flops_per_token(self, seq_len: int) -> float:
        """By the count of parameters: 2 for each that is multiplied by, which an embedding is not
        and a tied head is. What attention does beyond its matrices, and which experts a token
        passes, nobody knows from outside."""
        matrices = {p for p in self.theirs.parameters() if p.dim() >= 2}
        tied = self.head_weight is self.embed.weight
        return 2 * (sum(p.numel() for p in matrices) - (0 if tied else self.embed.weight.numel()))


def build(
    model_config: TransformersConfig,
    seed: int,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> TransformersModel:
    """Their model as it begins, fp32, by their own initialisation under our seed. Raises
    SettingsError when it cannot be made."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        try:
            theirs = AutoModelForCausalLM.from_config(
                config_of(model_config.config), dtype=torch.float32, trust_remote_code=False
            )
        except Exception as e:
            raise SettingsError(
                f"model.config: transformers cannot make a {model_config.model_type} model of it: {first_line(e)}"
            ) from e
    refuse_what_checkpoints_do_not_hold(theirs)
    return TransformersModel(model_config, theirs.float().to(device), compute_dtype)


def dropouts(model_config: TransformersConfig) -> dict[str, float]:
    """What of their model is dropped while it trains, by the name of the setting."""
    settings = config_of(model_config.config).to_dict()
    return {
        key: value
        for key, value in settings.items()
        if "drop" in key and isinstance(value, float) and value > 0
    }


def read_model_config(config: dict[str, Any], where: str) -> TransformersConfig:
    """The shape in a config.json that transformers, or a class that a plugin registered,
    understands. Raises SettingsError."""
    theirs = config_of(config, where)
    facts = {
        name: getattr(theirs, name, None)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers")
    }
    missing = [name for name, value in facts.items() if type(value) is not int]
    if missing:
        raise SettingsError(
            f"{where}: its class does not say {', '.join(missing)}, which a causal language model has"
        )
    return TransformersConfig(
        config, **facts, max_position_embeddings=getattr(theirs, "max_position_embeddings", 0) or 0
    )


def config_of(config: dict[str, Any], where: str = "model.config") -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**with_infinities(config))
    except Exception as e:  # every class has validators of its own
        raise SettingsError(
            f"{where}: transformers cannot read it ({first_line(e)}); model.backend = 'transformers' takes the model types that "
            "transformers knows, and those that a file of model.plugins registers with AutoConfig and AutoModelForCausalLM"
        ) from e


def with_infinities(value: Any) -> Any:
    """A part of a config.json with transformers' {"__float__": "Infinity"} as the number that it
    stands for; JSON has none."""
    if isinstance(value, list):
        return [with_infinities(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {name: with_infinities(entry) for name, entry in value.items()}


def first_line(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])


def refuse_what_checkpoints_do_not_hold(theirs: nn.Module) -> None:
    """A checkpoint holds parameters. A buffer that is saved with a model may be learned elsewhere
    and would begin anew."""
    buffers = [name for name, _ in theirs.named_buffers() if name in theirs.state_dict()]
    if buffers:
        raise SettingsError(
            f"model.backend = 'transformers': {type(theirs).__name__} keeps state beside its parameters ({', '.join(buffers[:3])}), "
            "which our checkpoints do not hold"
        )


def load_weights(folder: Path | str, model_config: TransformersConfig) -> dict[str, Tensor]:
    """The state dict of `TransformersModel` from a folder of their weights, fp32; pickles are read as tensors
    only.

    Raises CheckpointError naming what is missing, unknown or wrongly shaped.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            theirs, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config_of(model_config.config),
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except Exception as e:
        raise CheckpointError(
            f"{folder}: transformers cannot load its weights ({first_line(e)})"
        ) from e
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
    if wrong:
        raise CheckpointError(
            f"{folder}: its tensors are not those of the model that model.config describes: {wrong}"
        )
    return TransformersModel(model_config, theirs).state_dict()


def model_of(
    model_config: TransformersConfig,
    weights: dict[str, Tensor],
    device: torch.device | str,
    compute_dtype: torch.dtype,
) -> TransformersModel:
    """Their model with these parameters, those of a checkpoint. Raises CheckpointError when they
    are another model's."""
    model = build(model_config, 0, "cpu", compute_dtype)
    parameters = dict(model.named_parameters())
    differ = parameters.keys() ^ weights.keys()
    if differ:
        raise CheckpointError(
            f"the checkpoint is of another model than {model_config.model_type}: {', '.join(sorted(differ)[:3])}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model.to(device)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # two rows of lengths that never come again
def refuse_unless_documents_are_kept_apart(model: TransformersModel) -> None:
    """data.varlen packs documents that must not see each other. Whether a class keeps them apart
    when positions begin anew is not written anywhere, so it is tried: two documents in a row
    against each alone, on the very model that will be trained. Where the first document would
    change nothing even if it were seen, nothing was shown, and that is refused too.

    Raises SettingsError saying what was seen.
    """
    device, name = next(model.parameters()).device, type(model.theirs).__name__
    ids_BT = torch.randint(
        model.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0)
    ).to(device)
    seen = TransformersModel(model.config, model.theirs)  # fp32
    alone_BTW = torch.cat([seen(part) for part in ids_BT.split([9, 15], 1)], 1)
    flowing_BTW = seen(ids_BT)
    scale = alone_BTW.abs().max()
    if not (flowing_BTW - alone_BTW).abs().max() > 100 * APART * scale:
        raise SettingsError(
            f"data.varlen: with the weights that it begins with, {name} gives the same whether it sees earlier documents or not, so "
            "it cannot be shown that it keeps them apart; begin from trained weights (model.weights), or set data.varlen = false"
        )
    positions_BT = torch.cat([torch.arange(9), torch.arange(15)])[None].to(device)
    packed_BTW = (
        seen.theirs(ids_BT, position_ids=positions_BT, **seen.without_cache).logits
        if seen.takes_positions
        else flowing_BTW
    )
    apart = ((packed_BTW - alone_BTW).abs().max() / scale).item()
    if not apart <= APART:
        raise SettingsError(
            f"data.varlen: {name} lets a document see the one before it in its row (logits differ by {apart:.1e} of the largest), so "
            "packed documents would not be separate; set data.varlen = false, or use a model that longfire has itself"
        )


def save(
    model: TransformersModel,
    folder: Path,
    dtype: torch.dtype,
    ends: dict[str, int | None],
    shard_bytes: int,
) -> None:
    """Write their model into a folder, as they do. ends: ids of its special words."""
    config = copy.deepcopy(model.theirs.config)
    config.update(ends)
    with (
        torch.device("meta"),
        quiet_transformers(),
    ):  # no copy of theirs: some keep what they computed last, which has none
        written = type(model.theirs)(config)
    weights = {
        name: tensor.detach().to(dtype) for name, tensor in model.theirs.state_dict().items()
    }
    written.load_state_dict(weights, assign=True)
    written.tie_weights()
    with quiet_transformers():
        written.save_pretrained(folder, max_shard_size=shard_bytes)


@torch.no_grad()
def compare_saved(model: TransformersModel, folder: Path, dtype: torch.dtype) -> Check:
    """Compare what was saved with the model it was made of. Raises CheckpointError saying what
    differs."""
    from transformers import AutoModelForCausalLM

    device = next(model.parameters()).device
    with quiet_transformers():
        again, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}
    refuse_unless(not wrong, f"{type(again).__name__} does not find its tensors: {wrong}")
    given, back = dict(model.theirs.named_parameters()), dict(again.named_parameters())
    refuse_unless(given.keys() == back.keys(), "the model that was read has other parameters")
    for name, parameter in given.items():
        refuse_other_bytes(parameter.to(dtype).float().cpu(), back[name], name, folder)
    ids_BT = ids_for(model.config, device)
    logits_BTW = TransformersModel(model.config, model.theirs)(
        ids_BT
    )  # fp32 whatever the run computes in
    own_kl = kl(logits_BTW, TransformersModel(model.config, again.to(device))(ids_BT))
    tolerated = tolerated_kl(logits_BTW, model.config.num_hidden_layers, device)
    if dtype == torch.float32:
        refuse_unless(
            own_kl <= tolerated,
            f"logits after reloading differ: KL {own_kl:.1e}, tolerated {tolerated:.1e}",
        )
    size = sum(p.numel() for p in given.values()) * dtype.itemsize
    name, kind = type(again).__name__, str(dtype).removeprefix("torch.")
    return Check(
        len(given),
        size,
        kind,
        ids_BT.numel(),
        own_kl,
        name,
        None,
        "it is the class that was trained",
    )
