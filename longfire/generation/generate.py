"""Text that a model continues: one forward over the prompt, then one token at a time from the cache
of the layers.

Several prompts are continued together: each prompt is first fed alone, then the next token of all
is computed at once. Each draws with its own generator, so its text does not depend on the others.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longfire.checkpoint.weights import Opened
from longfire.config.options import Sampling
from longfire.data.tokenizer import Tokenizer
from longfire.errors import CheckpointError, SettingsError
from longfire.initialise import keyed_generator
from longfire.mixers.cache import Cache
from longfire.mixers.mixer import Sequence
from longfire.model import Model

# Tokens of a prompt that are fed at once: bounds the memory of long prompts
PROMPT_CHUNK = 2048
UNFINISHED = "\ufffd"  # what decoders write for bytes that are not yet a character


class Continuation:
    """A text while it is generated: its ids, how further ones are drawn, and whether it is over.

    stop_ids end it and are left out. vocab_size: only smaller ids are drawn (a vocabulary may be
    padded); 0: all. index: number of the prompt among those with the same seed. reader: turns the
    ids into text, where text is wanted.
    """

    def __init__(
        self,
        ids: list[int],
        sampling: Sampling,
        stop_ids: Iterable[int] = (),
        vocab_size: int = 0,
        index: int = 0,
        reader: "Reader | None" = None,
    ) -> None:
        assert ids, "a first token is needed: see prompt_ids"
        self.ids = list(ids)
        self.sampling = sampling
        self.stop_ids = set(stop_ids)
        self.vocab_size = vocab_size
        self.reader = reader
        if index:
            self.chance = keyed_generator(sampling.seed, f"prompt {index}")
        else:
            self.chance = torch.Generator().manual_seed(sampling.seed)
        self.drawn = 0
        self.over = False
        self.seen_V: Tensor | None = None  # which ids the text has; with repetition_penalty

    def text_reader(self) -> "Reader":
        """What turns its ids into text."""
        assert self.reader is not None, "made by continuation_of"
        return self.reader

    def take(self, logits_V: Tensor) -> int | None:
        """Draw the next id and append it; None if it is one that ends the text. logits_V: of the
        whole vocabulary."""
        logits_V = logits_V[: self.vocab_size or None].float().cpu()
        if self.sampling.repetition_penalty != 1:
            if self.seen_V is None:
                self.seen_V = torch.zeros(logits_V.shape, dtype=torch.bool)
                self.seen_V[[i for i in self.ids if i < len(logits_V)]] = True
            logits_V = penalised(logits_V, self.seen_V, self.sampling.repetition_penalty)
        drawn = draw(logits_V, self.sampling, self.chance)
        if drawn in self.stop_ids:
            self.over = True
            return None
        self.ids.append(drawn)
        self.drawn += 1
        self.over = self.drawn >= self.sampling.max_new_tokens
        if self.seen_V is not None:
            self.seen_V[drawn] = True
        return drawn


@dataclass
class Pace:
    """The time that a generation took, and the memory of its cache. A step gives a token to each of
    several texts."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0  # after the first of each text, which is computed with its prompt
    steps: int = 0
    seconds: float = 0.0
    first_bytes: int = 0  # of the cache, when the first token was drawn
    last_bytes: int = 0

    def __str__(self) -> str:
        text = f"prompts: {self.prompt_tokens:,} tokens in {self.prompt_seconds:.2f} s"
        if self.steps and self.seconds > 0:
            text += (
                f"; {self.tokens / self.seconds:,.1f} tokens/s, "
                f"{1000 * self.seconds / self.steps:.2f} ms a token"
            )
        return (
            f"{text}; cache: {self.first_bytes:,} bytes at the first token, {self.last_bytes:,} "
            "at the last"
        )


@torch.no_grad()
def steps(
    model: Model,
    continuations: list[Continuation],
    cache: Cache | None = None,
    pace: Pace | None = None,
) -> Iterator[tuple[Continuation, int]]:
    """(continuation, id) of every id that is drawn, until all are over. The caller may set `over`
    of a continuation: it then gets no more tokens.

    cache: of a single continuation, with the first of its ids; it is extended. Memory grows with
    the length only in layers of softmax attention without a window; recurrent ones keep a state.
    """
    if pace is None:
        pace = Pace()
    started = time.perf_counter()
    caches: list[Cache] = []
    logits: list[Tensor] = []
    for continuation in continuations:
        own = Cache() if cache is None else cache
        pace.prompt_tokens += len(continuation.ids) - own.length
        logits.append(feed(model, continuation.ids[own.length :], own))
        caches.append(own)
    logits_BV = torch.stack(logits)
    cache = caches[0] if len(continuations) == 1 else Cache.stack(caches)
    del caches, own  # a stack is a copy: these would keep the memory
    pace.prompt_seconds += time.perf_counter() - started
    pace.first_bytes = pace.first_bytes or cache.memory_bytes()
    step_started: float | None = None
    while True:
        for continuation, logits_V in zip(continuations, logits_BV):
            drawn = continuation.take(logits_V)
            if drawn is not None:
                yield continuation, drawn
                pace.tokens += step_started is not None
        if step_started is not None:
            pace.seconds += time.perf_counter() - step_started
            pace.steps += 1
        going = [number for number, one in enumerate(continuations) if not one.over]
        if not going:
            pace.last_bytes = cache.memory_bytes()
            return
        if len(going) < len(continuations):
            cache = cache.select(going)
            continuations = [continuations[number] for number in going]
        step_started = time.perf_counter()
        logits_BV = advance(model, [one.ids[-1] for one in continuations], cache)


def generate(
    model: Model,
    ids: list[int],
    sampling: Sampling,
    stop_ids: Iterable[int] = (),
    vocab_size: int = 0,
) -> list[int]:
    """The ids that continue `ids`, without them and without the stop id that ended them."""
    text = Continuation(ids, sampling, stop_ids, vocab_size)
    return [drawn for _, drawn in steps(model, [text])]


def feed(model: Model, ids: list[int], cache: Cache) -> Tensor:
    """Feed more ids of the one sequence in `cache`; returns the logits (V,) of the next id."""
    for start in range(0, len(ids), PROMPT_CHUNK):
        hidden_BTD = hidden_states(model, [ids[start : start + PROMPT_CHUNK]], cache)
    return model.logits(hidden_BTD[:, -1:])[0, 0]


def advance(model: Model, ids_B: list[int], cache: Cache) -> Tensor:
    """Feed the next id of every sequence in `cache`; returns the logits (B, V) of the ids after
    them."""
    return model.logits(hidden_states(model, [[i] for i in ids_B], cache))[:, 0]


# a compiled model would be compiled again for every length
@torch.compiler.set_stance("force_eager")
def hidden_states(model: Model, ids: list[list[int]], cache: Cache) -> Tensor:
    """Hidden states (B, T, D) of ids (B, T) that follow those in the cache. Raises SettingsError
    beyond learned positions."""
    ids_BT = torch.tensor(ids, device=model.embed.weight.device)
    limit = model.config.max_position_embeddings
    if model.config.learned_positions and cache.length + ids_BT.shape[1] > limit:
        raise SettingsError(
            f"the model has learned {limit} positions (max_position_embeddings) and cannot go "
            "beyond; shorten the prompt or max_new_tokens"
        )
    lengths = torch.as_tensor(cache.lengths_B, device=ids_BT.device).view(-1, 1)
    positions_BT = (lengths + torch.arange(ids_BT.shape[1], device=ids_BT.device)).expand_as(ids_BT)
    return model(ids_BT, Sequence(positions_BT, cache=cache))


def penalised(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """The logits, with those of seen tokens divided by a penalty, or multiplied where they are
    negative (CTRL, Keskar 2019, section 4.1)."""
    lowered_V = torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
    return torch.where(seen_V, lowered_V, logits_V)


def draw(logits_V: Tensor, sampling: Sampling, chance: torch.Generator) -> int:
    """An id by its probability among those that top_k, top_p and min_p leave, in fp64 on the CPU:
    the same on every device.

    min_p: those at least as likely as this share of the most likely one (Nguyen 2024). Raises
    CheckpointError for logits that are NaN.
    """
    logits_V = logits_V.cpu()
    if logits_V.isnan().any():
        raise CheckpointError(
            "the model's logits are NaN: its weights are broken, or training diverged; take an "
            "earlier --step"
        )
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits, ids = likeliest(logits_V, sampling.top_k)
    p = (logits.double() / sampling.temperature).softmax(-1)
    before = p.cumsum(-1) - p
    p = p[(before < sampling.top_p) & (p >= sampling.min_p * p[0])]  # the likeliest always stays
    place = torch.rand((), generator=chance, dtype=torch.float64) * p.sum()
    return int(ids[min(int(torch.searchsorted(p.cumsum(-1), place, right=True)), len(p) - 1)])


def likeliest(logits_V: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest (0: all), largest first, and their ids; of equals the lower ids."""
    if not 0 < k < len(logits_V):
        return logits_V.sort(descending=True, stable=True)
    # sorting the whole vocabulary takes longer than a small model
    ids = (logits_V >= logits_V.topk(k).values[-1]).nonzero()[:, 0]
    logits, order = logits_V[ids].sort(descending=True, stable=True)
    return logits[:k], ids[order[:k]]


class Reader:
    """Turns ids into text as they are drawn, in whole characters, up to a stop.

    What may be the beginning of a stop, or of a character, is held back. Each step decodes from the
    last shown piece on, with that piece before it: decoders treat the beginning of a text
    differently.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], stops: tuple[str, ...] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.ended = False
        self.ids = list(prompt[-4:])
        self.shown = len(prompt[-4:])
        self.held = ""

    def push(self, drawn: int) -> str:
        """The text that can be shown after this id; sets `ended` when a stop is complete."""
        self.ids.append(drawn)
        before = self.tokenizer.decode(self.ids[: self.shown])
        text = self.tokenizer.decode(self.ids)
        if len(text) <= len(before) or text.endswith(UNFINISHED):
            return ""
        newly_shown = len(self.ids) - self.shown
        self.ids = self.ids[self.shown :]
        self.shown = newly_shown
        return self.until_stop(text[len(before) :])

    def rest(self) -> str:
        """The text that was held back, at the end of all ids."""
        if self.ended:
            return ""
        left = self.tokenizer.decode(self.ids)[len(self.tokenizer.decode(self.ids[: self.shown])) :]
        shown = self.until_stop(left)
        if self.ended:
            return shown
        return shown + self.held

    def until_stop(self, text: str) -> str:
        self.held += text
        ends = [self.held.index(stop) for stop in self.stops if stop in self.held]
        if ends:
            self.ended = True
            return self.held[: min(ends)]
        begun = max([begun_length(self.held, stop) for stop in self.stops], default=0)
        safe = len(self.held) - begun
        shown = self.held[:safe]
        self.held = self.held[safe:]
        return shown


def begun_length(text: str, stop: str) -> int:
    """The number of characters at the end of a text with which a stop may begin."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def continuation_of(
    model: Model, tokenizer: Tokenizer, ids: list[int], sampling: Sampling, index: int = 0
) -> Continuation:
    """The continuation of a prompt as text; EOS, other end tokens of the model's files and stops
    end it."""
    vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    reader = Reader(tokenizer, ids, sampling.stop)
    return Continuation(ids, sampling, tokenizer.end_ids, vocab_size, index, reader)


def write(
    model: Model,
    continuations: list[Continuation],
    cache: Cache | None = None,
    pace: Pace | None = None,
) -> Iterator[tuple[Continuation, str]]:
    """(continuation, piece of its text), each piece as soon as it can be shown."""
    for continuation, drawn in steps(model, continuations, cache, pace):
        reader = continuation.text_reader()
        piece = reader.push(drawn)
        continuation.over = continuation.over or reader.ended
        if piece:
            yield continuation, piece
    for continuation in continuations:
        piece = continuation.text_reader().rest()
        if piece:
            yield continuation, piece


def stream_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    add_bos: bool = False,
    index: int = 0,
    pace: Pace | None = None,
) -> Iterator[str]:
    """The text that continues the prompt, without it, in pieces. EOS ends it."""
    ids = prompt_ids(tokenizer, prompt, add_bos)
    continuation = continuation_of(model, tokenizer, ids, sampling, index)
    return (piece for _, piece in write(model, [continuation], pace=pace))


def generate_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling | None = None,
    add_bos: bool = False,
) -> str:
    """The text that continues the prompt, without it; EOS ends it. The public `longfire.generate`.

    sampling: how tokens are chosen and how many at most; None: as `longfire.Sampling()` says.
    add_bos: whether the prompt begins with BOS, as documents of the model's training did. Raises
    SettingsError for an empty prompt where the tokenizer has neither BOS nor EOS.
    """
    return "".join(stream_text(model, tokenizer, prompt, sampling or Sampling(), add_bos))


def generate_texts(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[str],
    sampling: Sampling,
    add_bos: bool = False,
    batch_size: int = 8,
    pace: Pace | None = None,
) -> Iterator[str]:
    """The text that continues each prompt, in their order, `batch_size` texts at a time; the same
    for any batch_size."""
    for first in range(0, len(prompts), batch_size):
        batch: list[Continuation] = []
        for index, prompt in enumerate(prompts[first : first + batch_size], first):
            ids = prompt_ids(tokenizer, prompt, add_bos)
            batch.append(continuation_of(model, tokenizer, ids, sampling, index))
        yield from written(model, batch, pace)


def written(model: Model, continuations: list[Continuation], pace: Pace | None = None) -> list[str]:
    """The whole text of each continuation."""
    texts = dict.fromkeys(continuations, "")
    for continuation, piece in write(model, continuations, pace=pace):
        texts[continuation] += piece
    return list(texts.values())


def prompt_ids(tokenizer: Tokenizer, prompt: str, add_bos: bool = False) -> list[int]:
    """Ids of a prompt. An empty one begins as a document does: with BOS, else after the EOS of the
    one before."""
    ids = tokenizer.encode(prompt)
    if add_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1]
    if not ids:
        raise SettingsError(
            "the prompt is empty, and the tokenizer has neither BOS nor EOS to begin with: give "
            "some text"
        )
    return ids


def begins_with_bos(opened: Opened) -> bool:
    """Whether the model's documents began with BOS: as its run says, else as the files of its
    tokenizer do."""
    if opened.run:
        return opened.run.tokenizer.add_bos
    return opened.tokenizer.adds_bos
