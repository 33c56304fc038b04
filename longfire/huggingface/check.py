"""What an export or an import is compared with before it is called done: its own bytes, our logits,
and those of their class."""

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from longfire import ops
from longfire.config.config_file import read_config
from longfire.config.model_config import ModelConfig, mixer_of
from longfire.data.tokenizer import Tokenizer
from longfire.errors import CheckpointError, first_line
from longfire.huggingface.families import choose_family, family_named, family_of
from longfire.huggingface.family import Family
from longfire.huggingface.load import COMPUTED, load_weights, model_of, read_weights
from longfire.model import Model

ROWS, TOKENS = 2, 64  # up to 64 tokens fla runs its recurrent kernels, which are fp32 throughout
KL_NATS = 1e-10  # promise 9
TEXT = "def f(x):\n\treturn x ** 2  # naïve 漢字 🙂\n\n  1234567 <eos> </s>"  # what tokenizers trip over


@dataclass(frozen=True)
class Check:
    """What was compared, and how far apart it was. KL in nats a token, mean over the compared
    tokens.

    own_kl: the given model against the reloaded one; in bf16 or fp16 that is what rounding the
    weights costs.
    peer_kl: the reloaded model against `peer`, a class of another package; None with the reason in
    `peer_absent`. tokens = 0: only bytes were compared. tokenizer_differs: how transformers reads
    the tokenizer's files, if not as we do.
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
        bytes_told = f"reloaded and compared: {self.tensors} tensors ({size}) equal byte for byte; "
        words_told = self.tokenizer_differs or "the tokenizer by transformers gives the same ids"
        if not self.tokens:
            return f"{bytes_told}logits not, as asked for; {words_told}"
        peer = (
            f"{self.peer}: KL {self.peer_kl:.1e}"
            if self.peer_kl is not None
            else f"{self.peer}: not compared, {self.peer_absent}"
        )
        own = (
            "the same"
            if self.own_kl == 0
            else f"KL {self.own_kl:.1e}" + (" by rounding" if self.dtype != "float32" else "")
        )
        return f"{bytes_told}logits of {self.tokens} tokens: ours {own}; {peer}; {words_told}"


@torch.no_grad()
def compare(
    model: Model, tokenizer: Tokenizer, folder: Path, written: dict[str, torch.dtype]
) -> Check:
    """Compare an export in `folder` with the model it was made of. written: parameter -> its type
    in the files.

    Raises CheckpointError saying what differs.
    """
    model_config, device = model.config, next(model.parameters()).device
    given = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    reloaded = load_weights(folder, model_config)
    for name, dtype in written.items():
        refuse_other_bytes(given[name].to(dtype).float(), reloaded[name].to(device), name, folder)
    ids_BT = ids_for(model_config, device)
    first = model_of(
        model_config, given, device
    )  # the same tensors; fp32 whatever the model computes in, and not compiled
    logits_BTW = first.logits(first(ids_BT))
    again = model_of(model_config, reloaded, device)
    again_BTW = again.logits(again(ids_BT))
    tolerated = tolerated_kl(logits_BTW, model_config.num_hidden_layers, device)
    own_kl = kl(logits_BTW, again_BTW)
    lowest = min(written.values(), key=lambda dtype: dtype.itemsize)
    if lowest == torch.float32:
        refuse_unless(
            own_kl <= tolerated,
            f"our own logits after reloading differ: KL {own_kl:.1e}, tolerated {tolerated:.1e}",
        )
    del first, again
    compare_tokenizer(tokenizer, folder)
    peer = compare_peer(
        family_named(choose_family(model_config)), folder, model_config, ids_BT, again_BTW
    )
    size = sum(given[name].numel() * dtype.itemsize for name, dtype in written.items())
    return Check(
        len(written), size, str(lowest).removeprefix("torch."), ids_BT.numel(), own_kl, *peer
    )


@torch.no_grad()
def compare_bytes(
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    folder: Path,
    written: dict[str, torch.dtype],
    model_config: ModelConfig,
) -> Check:
    """The same without any model: each tensor of an export with what was written, one of both in
    memory at a time. Raises CheckpointError naming the tensor that differs."""
    size = 0
    for name, found in read_weights(folder, model_config):
        refuse_other_bytes(weights[name].to(written[name]).float(), found, name, folder)
        size += found.numel() * written[name].itemsize
    compare_tokenizer(tokenizer, folder)
    lowest = min(written.values(), key=lambda dtype: dtype.itemsize)
    return Check(len(written), size, str(lowest).removeprefix("torch."), 0, 0.0, "")


@torch.no_grad()
def compare_imported(
    weights: dict[str, Tensor], tokenizer: Tokenizer, folder: Path, model_config: ModelConfig
) -> Check:
    """Compare what was written of the Hugging Face weights in `folder`, and read again, with them
    and with their own class.

    One tensor of the folder is in memory beside the weights; their own model comes when ours has
    gone. Raises CheckpointError.
    """
    tensors, size = len(weights), sum(tensor.nbytes for tensor in weights.values())
    for name, tensor in read_weights(folder, model_config):
        refuse_other_bytes(tensor, weights[name], name, folder)
    differs = compare_imported_tokenizer(tokenizer, folder)
    ids_BT = ids_for(model_config, torch.device("cpu"))
    model = model_of(model_config, weights)
    logits_BTW = model.logits(model(ids_BT))
    del model, weights
    family = family_of(read_config(folder), str(folder))
    refused = config_refused(folder) if family.package == "transformers" else ""
    if refused:
        peer = f"{family.architecture} of {family.package}", None, refused
    else:
        peer = compare_peer(family, folder, model_config, ids_BT, logits_BTW)
    return Check(tensors, size, "float32", ids_BT.numel(), 0.0, *peer, tokenizer_differs=differs)


def ids_for(model_config: ModelConfig, device: torch.device) -> Tensor:
    """(B, T) words to compare logits on, always the same; no longer than the positions that were
    learned."""
    length = (
        min(TOKENS, model_config.max_position_embeddings)
        if model_config.learned_positions
        else TOKENS
    )
    return torch.randint(
        model_config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0)
    ).to(device)


def refuse_other_bytes(expected: Tensor, found: Tensor, name: str, folder: Path) -> None:
    if not expected.contiguous().view(torch.int32).equal(found.contiguous().view(torch.int32)):
        raise CheckpointError(
            f"{folder}: {name} came back with other bytes than were written; the disk may be failing"
        )


def compare_peer(
    family: Family, folder: Path, model_config: ModelConfig, ids_BT: Tensor, logits_BTW: Tensor
) -> tuple[str, float | None, str]:
    """Their class's logits against ours: (its name, KL, "") or (its name, None, why it was not
    compared)."""
    peer, absent = (
        f"{family.architecture} of {family.package}",
        peer_absent(family, model_config, ids_BT.device),
    )
    if absent:
        return peer, None, absent
    found = kl(logits_BTW, peer_logits(family, folder, ids_BT))
    tolerated = tolerated_kl(logits_BTW, model_config.num_hidden_layers, ids_BT.device)
    refuse_unless(
        found <= tolerated, f"{peer} gives other logits: KL {found:.1e}, tolerated {tolerated:.1e}"
    )
    return peer, found, ""


def refuse_unless(condition: bool, difference: str) -> None:
    """A NaN compares as false, so it is refused too."""
    if not condition:
        raise CheckpointError(f"nothing was written: {difference}")


def kl(p_BTW: Tensor, q_BTW: Tensor) -> float:
    """Mean over tokens of KL(p || q) in nats, of two sets of logits, in fp64.

    sum_w p (exp(d) - 1 - d) with d = log q - log p: equal to sum_w p (-d), but no term is negative,
    so that 1e-16 is not lost in the sum.
    """
    log_p, log_q = p_BTW.double().log_softmax(-1), q_BTW.double().log_softmax(-1)
    d = log_q - log_p
    return (log_p.exp() * (d.expm1() - d)).sum(-1).mean().item()


def tolerated_kl(logits_BTW: Tensor, layers: int, device: torch.device) -> float:
    """KL that rounding alone can make between two right computations: KL_NATS, more where a model
    is deep.

    A relative error e in each of 2 * layers additions to the residual stream moves logits by about
    e * sqrt(2 * layers) * max|logit|; a shift of d in the logits costs at most d^2 / 2. With a
    factor 4 in d for sums of many terms. e is 2^-23, or 2^-10 where kernels multiply in TF32.
    """
    tf32 = device.type == "cuda" and (
        torch.backends.cuda.matmul.allow_tf32 or ops.chosen("linear_attention") == "fla"
    )
    shift = 4 * (2**-10 if tf32 else 2**-23) * math.sqrt(2 * layers) * logits_BTW.abs().max().item()
    return max(KL_NATS, shift**2 / 2)


def compare_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Raises CheckpointError when transformers reads the tokenizer's files as another tokenizer, or
    not at all."""
    _, same = by_auto_tokenizer(tokenizer, folder)
    refuse_unless(
        same,
        f"transformers' AutoTokenizer gives other ids than ours from the files in {folder.name}",
    )


def by_auto_tokenizer(tokenizer: Tokenizer, folder: Path) -> tuple[str, bool]:
    """The class that AutoTokenizer makes of the files, and whether it is the same tokenizer as
    ours. Raises CheckpointError."""
    from transformers import AutoTokenizer  # seconds of imports, only when something is exported

    try:
        with quiet_transformers():
            theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            ids = encoded(theirs)  # some fail only here
    except Exception as e:  # each class has demands of its own; tokenizers raises Exception
        raise CheckpointError(f"AutoTokenizer cannot read these files ({first_line(e)})") from e
    ends = (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    return type(theirs).__name__, ends and ids == tokenizer.encode(TEXT)


def compare_imported_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Compare with the tokenizer.json as it is. Where the class that the other files name reads it
    as another tokenizer (some classes of transformers make a part of it anew), that is theirs to
    repair: a line that says so, else "".

    Raises CheckpointError when tokenizer.json itself gives other ids than ours.
    """
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.is_file():
        compare_tokenizer(tokenizer, folder)
        return ""
    as_it_is = PreTrainedTokenizerFast(tokenizer_file=str(file))
    refuse_unless(
        encoded(as_it_is) == tokenizer.encode(TEXT),
        f"{file} gives other ids by transformers than by longfire",
    )
    try:
        name, same = by_auto_tokenizer(tokenizer, folder)
        how = f"AutoTokenizer makes a {name} of these files, which gives other ids than their tokenizer.json"
    except CheckpointError as e:
        same, how = False, str(e)
    if same:
        return ""
    return f"tokenizer: {how}. longfire takes tokenizer.json as it is, and its exports name a class that does too"


def encoded(theirs: Any) -> list[int]:
    return theirs(TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def peer_absent(family: Family, model_config: ModelConfig, device: torch.device) -> str:
    """Why the family's own class cannot run here; "" if it can."""
    if family.package in ("transformers", "longfire"):
        return ""
    missing = [name for name in ("fla", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    if device.type != "cuda":
        return "its kernels need CUDA"
    if "attention" in map(mixer_of, model_config.layer_types):
        return "its softmax layers have no fp32"
    return ""


def config_refused(folder: Path) -> str:
    """Why the installed transformers does not read a config.json that we can read; "" if it does.
    Newer ones check types strictly, so that some files of older ones (`"use_cache": 1`) are no
    longer theirs."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError) as e:
        return f"it does not read this config.json ({' '.join(str(e).split())[:160]})"
    return ""


def peer_logits(family: Family, folder: Path, ids_BT: Tensor) -> Tensor:
    """Logits of the ids by the family's own class, loaded from the folder as a user would, in
    fp32."""
    from transformers import AutoModelForCausalLM

    importlib.import_module(family.package)  # fla and longfire register their classes when imported
    with quiet_transformers():
        peer, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    buffers = (*COMPUTED, *family.buffers)  # which lie in old files, and no version needs
    wrong["unexpected_keys"] = [
        name for name in wrong.get("unexpected_keys", []) if not name.endswith(buffers)
    ]
    wrong = {kind: names for kind, names in wrong.items() if names}
    refuse_unless(not wrong, f"{type(peer).__name__} does not find its tensors: {wrong}")
    return peer.to(ids_BT.device).eval()(ids_BT, use_cache=False).logits


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no warning that it does not know fla's model types."""
    from transformers.utils import logging

    verbosity, showed_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if showed_bars:
            logging.enable_progress_bar()
