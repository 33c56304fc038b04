"""Text that a model continues: one forward over the prompt, then one token at a time from what the layers keep (their cache)."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longfire.data.tokenizer import Tokenizer
from longfire.errors import SettingsError
from longfire.mixers.mixer import Cache, Sequence
from longfire.model import Model
from longfire.weights import Opened, open_model

PROMPT_CHUNK = 2048  # tokens of a prompt that go through the model at once: bounds memory for long prompts
UNFINISHED = "\ufffd"  # what decoders write for bytes that are not yet a character


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The same seed gives the same text.

    temperature 0: always the likeliest. top_k: among the k likeliest (0: all). top_p: among the fewest likeliest whose
    probabilities sum to p. stop: text that ends the continuation and is left out of it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 42
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, right, mend in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("stop", "" not in self.stop, "texts that are not empty"),
        ):
            if not right:
                raise SettingsError(f"{name} = {getattr(self, name)!r} must be {mend}")


def generate(
    model: Model, ids: list[int], sampling: Sampling, stop_ids: Iterable[int] = (), words: int = 0
) -> list[int]:
    """The ids that continue `ids`, without them and without the stop id that ended them. words: see `tokens`."""
    return list(tokens(model, ids, sampling, stop_ids, words))


@torch.no_grad()
def tokens(
    model: Model, ids: list[int], sampling: Sampling, stop_ids: Iterable[int] = (), words: int = 0
) -> Iterator[int]:
    """`generate`, each id as soon as it is drawn. words: only ids below it (a vocabulary may be padded); 0: all.

    Memory grows with the length only in layers of softmax attention without a window; recurrent ones keep a state.
    """
    assert ids, "a first token is needed: see prompt_ids"
    cache, stops = Cache(), set(stop_ids)
    chance = torch.Generator().manual_seed(sampling.seed)
    for _ in range(sampling.max_new_tokens):
        logits_W = feed(model, ids, cache)
        drawn = draw(logits_W[: words or None], sampling, chance)
        if drawn in stops:
            return
        yield drawn
        ids = [drawn]


@torch.compiler.set_stance("force_eager")  # a compiled model would be compiled again for every length
def feed(model: Model, ids: list[int], cache: Cache) -> Tensor:
    """Let the model see more ids of the one sequence in `cache`; returns the logits (W,) of what follows them."""
    device = model.embed.weight.device
    for start in range(0, len(ids), PROMPT_CHUNK):
        ids_BT = torch.tensor([ids[start : start + PROMPT_CHUNK]], device=device)
        positions_BT = cache.length + torch.arange(ids_BT.shape[1], device=device)[None]
        hidden_BTD = model(ids_BT, Sequence(positions_BT, cache=cache))
    return model.logits(hidden_BTD[:, -1:])[0, 0]


def draw(logits_W: Tensor, sampling: Sampling, chance: torch.Generator) -> int:
    """An id by its probability among those that top_k and top_p leave, in fp64 on the CPU: the same on every device."""
    logits_W, ids_W = logits_W.double().cpu().sort(descending=True, stable=True)
    if sampling.temperature == 0:
        return int(ids_W[0])
    kept = sampling.top_k or len(logits_W)
    p = (logits_W[:kept] / sampling.temperature).softmax(-1)
    before = p.cumsum(-1) - p
    p = p[before < sampling.top_p]  # the likeliest always stays: nothing is before it
    place = torch.rand((), generator=chance, dtype=torch.float64) * p.sum()
    return int(ids_W[min(int(torch.searchsorted(p.cumsum(-1), place, right=True)), len(p) - 1)])


def prompt_ids(tokenizer: Tokenizer, prompt: str, add_bos: bool = False) -> list[int]:
    """Ids of a prompt. An empty one begins as a document does: with BOS, else after the EOS of the one before."""
    ids = tokenizer.encode(prompt)
    if add_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1]
    if not ids:
        raise SettingsError(
            "the prompt is empty, and the tokenizer has neither BOS nor EOS to begin with: give some text"
        )
    return ids


def begins_with_bos(opened: Opened) -> bool:
    """Whether the model's documents began with BOS: as its run says, else as its tokenizer.json puts one before texts."""
    if opened.run:
        return opened.run.tokenizer.add_bos
    return opened.tokenizer.words.encode("", add_special_tokens=True).ids[:1] == [opened.tokenizer.bos_id]


def generate_text(model: Model, tokenizer: Tokenizer, prompt: str, sampling: Sampling, add_bos: bool = False) -> str:
    """The text that continues the prompt, without it."""
    return "".join(stream_text(model, tokenizer, prompt, sampling, add_bos))


def stream_text(
    model: Model, tokenizer: Tokenizer, prompt: str, sampling: Sampling, add_bos: bool = False
) -> Iterator[str]:
    """`generate_text` in pieces, each as soon as it can be shown. EOS ends it."""
    ids = prompt_ids(tokenizer, prompt, add_bos)
    stops = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    drawn = tokens(model, ids, sampling, stops, min(tokenizer.vocab_size, model.shape.vocab_size))
    return until_stop(pieces(tokenizer, ids, drawn), sampling.stop)


def pieces(tokenizer: Tokenizer, prompt: list[int], drawn: Iterable[int]) -> Iterator[str]:
    """Text of the drawn ids, held back while its last bytes are not yet a character.

    Each step decodes from the last shown piece on, with that piece before it: decoders treat a text's beginning otherwise.
    """
    ids, shown, begin = list(prompt), len(prompt), max(0, len(prompt) - 4)
    for drawn_id in drawn:
        ids.append(drawn_id)
        before, text = tokenizer.decode(ids[begin:shown]), tokenizer.decode(ids[begin:])
        if len(text) > len(before) and not text.endswith(UNFINISHED):
            yield text[len(before) :]
            begin, shown = shown, len(ids)
    rest = tokenizer.decode(ids[begin:])[len(tokenizer.decode(ids[begin:shown])) :]
    if rest:
        yield rest


def until_stop(texts: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """The texts up to the first stop; what may be the beginning of a stop is held back."""
    held = ""
    for text in texts:
        held += text
        ends = [held.index(stop) for stop in stops if stop in held]
        if ends:
            yield held[: min(ends)]
            return
        lengths = (n for stop in stops for n in range(min(len(stop) - 1, len(held)), 0, -1) if held.endswith(stop[:n]))
        safe = len(held) - max(lengths, default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def main(folder: Path, prompts: list[str], sampling: Sampling, step: int = -1, plugins: tuple[str, ...] = ()) -> int:
    """Print what follows each prompt, as it is drawn, by the model in a run folder or a folder of Hugging Face weights."""
    opened = open_model(Path(folder), step, plugins=plugins)
    for prompt in prompts:
        sys.stdout.write(prompt)
        for text in stream_text(opened.model, opened.tokenizer, prompt, sampling, begins_with_bos(opened)):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    return 0
