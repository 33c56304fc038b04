"""What an export or an import is compared with before it counts as done: its own bytes, our logits,
and those of their class. check_tokenizer.py compares the tokenizer."""

import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from longfire.config.config_file import read_config
from longfire.config.model_config import ModelConfig, mixer_of
from longfire.config.transformers_config import TransformersConfig
from longfire.data.tokenizer import Tokenizer
from longfire.errors import CheckpointError
from longfire.huggingface.check_tokenizer import compare_imported_tokenizer, compare_tokenizer
from longfire.huggingface.comparing import check, quiet_transformers
from longfire.huggingface.families import choose_family, family_named, family_of
from longfire.huggingface.family import Family
from longfire.huggingface.load import COMPUTED, load_weights, model_of, read_weights
from longfire.model import Model
from longfire.ops.forms import chosen
from longfire.work_progress import WorkProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # seconds of imports

SEQUENCES = 2
TOKENS = 64  # of each; up to 64 fla runs its recurrent kernels, which are fp32 throughout
KL_NATS = 1e-10  # promise 9
REASON_CHARACTERS = 160  # of an error of transformers in a message


@dataclass(frozen=True)
class Check:
    """What was compared, and how large the differences were. KL in nats a token, mean over the
    compared tokens.

    memory_bytes: of the tensors in the files. tokens: 0 where only bytes were compared.
    own_kl: the given model against the reloaded one; in bf16 or fp16 that is the cost of rounding
    the weights.
    peer_kl: the reloaded model against `peer`, a class of another package; None with the reason in
    `peer_absent`.
    tokenizer_differs: how transformers reads the tokenizer's files, if not as longfire does.
    """

    tensors: int
    memory_bytes: int
    dtype: str
    tokens: int
    own_kl: float
    peer: str
    peer_kl: float | None = None
    peer_absent: str = ""
    tokenizer_differs: str = ""

    def __str__(self) -> str:
        size = f"{self.memory_bytes / 1e6:,.1f} MB, {self.dtype}"
        tensors = f"{self.tensors} tensors ({size}) equal byte for byte"
        tokenizer = self.tokenizer_differs or "the tokenizer by transformers gives the same ids"
        logits = "logits not, as asked for"
        if self.tokens:
            own = self._describe_own()
            logits = f"logits of {self.tokens} tokens: ours {own}; {self._describe_peer()}"
        return f"reloaded and compared: {tensors}; {logits}; {tokenizer}"

    def _describe_own(self) -> str:
        if self.own_kl == 0:
            return "the same"
        rounding = "" if self.dtype == "float32" else " by rounding"
        return f"KL {self.own_kl:.1e}{rounding}"

    def _describe_peer(self) -> str:
        if self.peer_kl is None:
            return f"{self.peer}: not compared, {self.peer_absent}"
        return f"{self.peer}: KL {self.peer_kl:.1e}"


class PeerCheck(NamedTuple):
    """The name of another class, its KL against ours, or None with the reason why it was not
    compared."""

    peer: str
    kl: float | None
    absent: str = ""


@torch.no_grad()
def compare(
    model: Model,
    tokenizer: Tokenizer,
    folder: Path,
    written: Mapping[str, torch.dtype],
) -> Check:
    """Compare an export in `folder` with the model it was made of. written: parameter -> its type
    in the files.

    Raises CheckpointError naming the difference.
    """
    model_config = model.config
    device = next(model.parameters()).device
    given = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    reloaded = load_weights(folder, model_config)
    for name, dtype in written.items():
        check_bytes(given[name].to(dtype).float(), reloaded[name].to(device), name, folder)
    ids_BT = ids_for(model_config, device)
    # The same tensors; in fp32 whatever the model computes in, and not compiled.
    original = model_of(model_config, given, device)
    logits_BTV = original.logits(original(ids_BT))
    again = model_of(model_config, reloaded, device)
    again_BTV = again.logits(again(ids_BT))
    own_kl = kl(logits_BTV, again_BTV)
    lowest = lowest_of(written)
    if lowest == torch.float32:
        tolerated = tolerated_kl(logits_BTV, model_config.num_hidden_layers, device)
        check(
            own_kl <= tolerated,
            f"our own logits after reloading differ: KL {own_kl:.1e}, tolerated {tolerated:.1e}",
        )
    del original, again
    compare_tokenizer(tokenizer, folder)
    family = family_named(choose_family(model_config))
    peer = compare_peer(family, folder, model_config, ids_BT, again_BTV)
    return Check(
        tensors=len(written),
        memory_bytes=size_of(given, written),
        dtype=name_of(lowest),
        tokens=ids_BT.numel(),
        own_kl=own_kl,
        peer=peer.peer,
        peer_kl=peer.kl,
        peer_absent=peer.absent,
    )


@torch.no_grad()
def compare_bytes(
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    folder: Path,
    written: Mapping[str, torch.dtype],
    model_config: ModelConfig,
) -> Check:
    """The same without any model: each tensor of an export with what was written, one of both in
    memory at a time. Raises CheckpointError naming the tensor that differs."""
    size = 0
    total = sum(weights[name].numel() for name in written)
    with WorkProgress("compare", total, "parameters") as progress:
        for name, found in read_weights(folder, model_config):
            check_bytes(weights[name].to(written[name]).float(), found, name, folder)
            size += found.numel() * written[name].itemsize
            progress.add(found.numel())
    compare_tokenizer(tokenizer, folder)
    return Check(
        len(written),
        size,
        name_of(lowest_of(written)),
        tokens=0,
        own_kl=0.0,
        peer="",
    )


@torch.no_grad()
def compare_imported(
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    folder: Path,
    model_config: ModelConfig,
) -> Check:
    """Compare an import, which was written and read again, with the Hugging Face weights in
    `folder` and with their own class.

    One tensor of the folder is in memory beside the weights. Their own model is loaded when ours
    has been freed. Raises CheckpointError.
    """
    tensors = len(weights)
    size = sum(tensor.nbytes for tensor in weights.values())
    for name, tensor in read_weights(folder, model_config):
        check_bytes(tensor, weights[name], name, folder)
    differs = compare_imported_tokenizer(tokenizer, folder)
    ids_BT = ids_for(model_config, torch.device("cpu"))
    model = model_of(model_config, weights)
    logits_BTV = model.logits(model(ids_BT))
    del model, weights
    family = family_of(read_config(folder), str(folder))
    refused = config_refused(folder) if family.package == "transformers" else ""
    if refused:
        peer = PeerCheck(f"{family.architecture} of {family.package}", None, refused)
    else:
        peer = compare_peer(family, folder, model_config, ids_BT, logits_BTV)
    return Check(
        tensors=tensors,
        memory_bytes=size,
        dtype="float32",
        tokens=ids_BT.numel(),
        own_kl=0.0,
        peer=peer.peer,
        peer_kl=peer.kl,
        peer_absent=peer.absent,
        tokenizer_differs=differs,
    )


def size_of(weights: Mapping[str, Tensor], written: Mapping[str, torch.dtype]) -> int:
    """Bytes of an export's parameters in the files."""
    size = 0
    for name, dtype in written.items():
        size += weights[name].numel() * dtype.itemsize
    return size


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16 ..."""
    return str(dtype).removeprefix("torch.")


def lowest_of(written: Mapping[str, torch.dtype]) -> torch.dtype:
    """The smallest type of an export's parameters."""
    return min(written.values(), key=lambda dtype: dtype.itemsize)


def ids_for(model_config: ModelConfig | TransformersConfig, device: torch.device) -> Tensor:
    """Token ids (B, T) to compare logits on, always the same ones; no longer than the positions
    that were learned."""
    length = TOKENS
    if isinstance(model_config, ModelConfig) and model_config.learned_positions:
        length = min(TOKENS, model_config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model_config.vocab_size, (SEQUENCES, length), generator=generator).to(
        device
    )


def check_bytes(
    expected: Tensor,
    found: Tensor,
    name: str,
    folder: Path,
) -> None:
    """Raises CheckpointError unless two fp32 tensors have the same bytes."""
    if not expected.contiguous().view(torch.int32).equal(found.contiguous().view(torch.int32)):
        raise CheckpointError(
            f"{folder}: {name} came back with other bytes than were written; the disk may be "
            "failing"
        )


def compare_peer(
    family: Family,
    folder: Path,
    model_config: ModelConfig,
    ids_BT: Tensor,
    logits_BTV: Tensor,
) -> PeerCheck:
    """Their class's logits against ours. Raises CheckpointError."""
    peer = f"{family.architecture} of {family.package}"
    absent = peer_absent(family, model_config, ids_BT.device)
    if absent:
        return PeerCheck(peer, None, absent)
    peer_kl = kl(logits_BTV, peer_logits(family, folder, ids_BT))
    tolerated = tolerated_kl(logits_BTV, model_config.num_hidden_layers, ids_BT.device)
    check(
        peer_kl <= tolerated,
        f"{peer} gives other logits: KL {peer_kl:.1e}, tolerated {tolerated:.1e}",
    )
    return PeerCheck(peer, peer_kl)


def kl(p_BTV: Tensor, q_BTV: Tensor) -> float:
    """Mean over tokens of KL(p || q) in nats, of two sets of logits, in fp64.

    sum_w p (exp(d) - 1 - d) with d = log q - log p: equal to sum_w p (-d), but no term is negative,
    so that 1e-16 is not lost in the sum.
    """
    log_p = p_BTV.double().log_softmax(-1)
    log_q = q_BTV.double().log_softmax(-1)
    d = log_q - log_p
    return (log_p.exp() * (d.expm1() - d)).sum(-1).mean().item()


def tolerated_kl(
    logits_BTV: Tensor,
    layers: int,
    device: torch.device,
) -> float:
    """KL that rounding alone can cause between two correct computations: KL_NATS, more where a
    model is deep.

    A relative error e in each of 2 * layers additions to the residual stream moves logits by about
    e * sqrt(2 * layers) * max|logit|; a shift of d in the logits costs at most d^2 / 2. With a
    factor 4 in d for sums of many terms. e is 2^-23, or 2^-10 where kernels multiply in TF32.
    """
    error = 2**-23
    if device.type == "cuda" and multiplies_in_tf32():
        error = 2**-10
    shift = 4 * error * math.sqrt(2 * layers) * logits_BTV.abs().max().item()
    return max(KL_NATS, shift**2 / 2)


def multiplies_in_tf32() -> bool:
    """Whether kernels on CUDA round the factors of products to TF32."""
    return torch.backends.cuda.matmul.allow_tf32 or chosen("linear_attention") == "fla"


def peer_absent(
    family: Family,
    model_config: ModelConfig,
    device: torch.device,
) -> str:
    """Why the family's own class cannot run here; "" if it can."""
    if family.package in ("transformers", "longfire"):
        return ""
    for name in ("fla", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    if device.type != "cuda":
        return "its kernels need CUDA"
    if "attention" in map(mixer_of, model_config.layer_types):
        return "its softmax layers have no fp32"
    return ""


def config_refused(folder: Path) -> str:
    """Why the installed transformers does not read a config.json that longfire reads; "" if it
    does. Newer versions check types strictly, and no longer read some files of older ones
    (`"use_cache": 1`)."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:REASON_CHARACTERS]
        return f"it does not read this config.json ({reason})"
    return ""


def peer_logits(
    family: Family,
    folder: Path,
    ids_BT: Tensor,
) -> Tensor:
    """Logits of the ids by the family's own class, loaded from the folder as a user would, in
    fp32. Raises CheckpointError."""
    importlib.import_module(family.package)  # fla and longfire register their classes when imported
    peer, wrong = load_peer(folder)
    # These are in old files, and no version needs them.
    buffers = (*COMPUTED, *family.buffers)
    unexpected = wrong.pop("unexpected_keys", [])
    unexpected = [name for name in unexpected if not name.endswith(buffers)]
    if unexpected:
        wrong["unexpected_keys"] = unexpected
    check(not wrong, f"{type(peer).__name__} does not find its tensors: {wrong}")
    module: nn.Module = peer
    return module.to(ids_BT.device).eval()(ids_BT, use_cache=False).logits


def load_peer(
    folder: Path | str,
    config: object = None,
) -> tuple["PreTrainedModel", dict[str, list[str]]]:
    """The model that transformers loads from a folder, in fp32, and its report: kind of problem ->
    names of tensors. config: of their class; None: that of the folder."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    arguments = {} if config is None else {"config": config}
    with quiet_transformers():
        loaded: object = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **arguments,
        )
    assert isinstance(loaded, tuple), "asked for by output_loading_info"
    model, report = loaded
    assert isinstance(model, PreTrainedModel), "a class of transformers"
    problems = {}
    for kind, names in report.items():
        if names:
            problems[kind] = sorted(map(str, names))
    return model, problems
