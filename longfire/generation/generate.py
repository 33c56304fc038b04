"""Text that a model continues: one forward over the prompt, then one token at a time from what the
layers keep (their cache).

Rows of several prompts go together: each prompt alone through the model, then a token of every row
at a time. A row draws by its own generator, so its text does not depend on who else is there.
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

PROMPT_CHUNK = (
    2048  # tokens of a prompt that go through the model at once: bounds memory for long prompts
)
UNFINISHED = "\ufffd"  # what decoders write for bytes that are not yet a character


class Row:
    """One text on its way: its ids, how further ones are drawn, and whether it is over.

    stop_ids end it and are left out. words: only ids below it are drawn (a vocabulary may be
    padded); 0: all. index: number of the prompt among those with the same seed. reader: what makes
    text of the ids, if anything does.
    """

    def __init__(
        self,
        ids: list[int],
        sampling: Sampling,
        stop_ids: Iterable[int] = (),
        words: int = 0,
        index: int = 0,
        reader: "Reader | None" = None,
    ) -> None:
        assert ids, "a first token is needed: see prompt_ids"
        self.ids = list(ids)
        self.sampling = sampling
        self.stop_ids = set(stop_ids)
        self.words = words
        self.reader = reader
        first = torch.Generator().manual_seed(sampling.seed)
        self.chance = keyed_generator(sampling.seed, f"prompt {index}") if index else first
        self.drawn = 0
        self.over = False
        self.seen_W: Tensor | None = None  # which ids the text has; with repetition_penalty

    def take(self, logits_W: Tensor) -> int | None:
        """Draw the next id and append it; None if it is one that ends the row."""
        logits_W = logits_W[: self.words or None].float().cpu()
        if self.sampling.repetition_penalty != 1:
            if self.seen_W is None:
                self.seen_W = torch.zeros(logits_W.shape, dtype=torch.bool)
                self.seen_W[[i for i in self.ids if i < len(logits_W)]] = True
            logits_W = penalised(logits_W, self.seen_W, self.sampling.repetition_penalty)
        drawn = draw(logits_W, self.sampling, self.chance)
        if drawn in self.stop_ids:
            self.over = True
            return None
        self.ids.append(drawn)
        self.drawn += 1
        self.over = self.drawn >= self.sampling.max_new_tokens
        if self.seen_W is not None:
            self.seen_W[drawn] = True
        return drawn


@dataclass
class Pace:
    """How long a generation took and what its cache held; steps give several tokens where rows go
    together."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0  # after the first of each row, which comes with its prompt
    steps: int = 0
    seconds: float = 0.0
    first_bytes: int = 0  # of the cache, when the first token was drawn
    last_bytes: int = 0

    def __str__(self) -> str:
        text = f"prompts: {self.prompt_tokens:,} tokens in {self.prompt_seconds:.2f} s"
        if self.steps and self.seconds > 0:
            text += f"; {self.tokens / self.seconds:,.1f} tokens/s, {1000 * self.seconds / self.steps:.2f} ms a token"
        return f"{text}; cache: {self.first_bytes:,} bytes at the first token, {self.last_bytes:,} at the last"


@torch.no_grad()
def steps(
    model: Model, rows: list[Row], cache: Cache | None = None, pace: Pace | None = None
) -> Iterator[tuple[Row, int]]:
    """(row, id) of every id that is drawn, until all rows are over. Who reads may set `row.over`:
    no token follows.

    cache: what one row's text has left of its ids so far; it is filled on. Memory grows with the
    length only in layers of softmax attention without a window; recurrent ones keep a state.
    """
    pace = Pace() if pace is None else pace
    started = time.perf_counter()
    caches = [Cache() if cache is None else cache for _ in rows]
    pace.prompt_tokens += sum(len(row.ids) - c.length for row, c in zip(rows, caches))
    logits_BW = torch.stack([feed(model, row.ids[c.length :], c) for row, c in zip(rows, caches)])
    cache = caches[0] if len(rows) == 1 else Cache.stack(caches)
    caches.clear()  # a stack is a copy
    pace.prompt_seconds += time.perf_counter() - started
    pace.first_bytes = pace.first_bytes or cache.memory_bytes()
    step_started: float | None = None
    while True:
        for row, logits_W in zip(rows, logits_BW):
            drawn = row.take(logits_W)
            if drawn is not None:
                yield row, drawn
                pace.tokens += step_started is not None
        if step_started is not None:
            pace.seconds = pace.seconds + time.perf_counter() - step_started
            pace.steps = pace.steps + 1
        going = [number for number, row in enumerate(rows) if not row.over]
        if not going:
            pace.last_bytes = cache.memory_bytes()
            return
        if len(going) < len(rows):
            cache = cache.select(going)
            rows = [rows[number] for number in going]
        step_started = time.perf_counter()
        logits_BW = advance(model, [row.ids[-1] for row in rows], cache)


def generate(
    model: Model, ids: list[int], sampling: Sampling, stop_ids: Iterable[int] = (), words: int = 0
) -> list[int]:
    """The ids that continue `ids`, without them and without the stop id that ended them."""
    return [drawn for _, drawn in steps(model, [Row(ids, sampling, stop_ids, words)])]


def feed(model: Model, ids: list[int], cache: Cache) -> Tensor:
    """Let the model see more ids of the one sequence in `cache`; returns the logits (W,) of what
    follows them."""
    for start in range(0, len(ids), PROMPT_CHUNK):
        hidden_BTD = see(model, [ids[start : start + PROMPT_CHUNK]], cache)
    return model.logits(hidden_BTD[:, -1:])[0, 0]


def advance(model: Model, ids_B: list[int], cache: Cache) -> Tensor:
    """Let the model see the next id of every row in `cache`; returns the logits (B, W) of what
    follows."""
    return model.logits(see(model, [[i] for i in ids_B], cache))[:, 0]


@torch.compiler.set_stance(
    "force_eager"
)  # a compiled model would be compiled again for every length
def see(model: Model, ids: list[list[int]], cache: Cache) -> Tensor:
    """Hidden states (B, T, D) of ids (B, T) that follow what is in the cache. Raises SettingsError
    beyond learned positions."""
    ids_BT = torch.tensor(ids, device=model.embed.weight.device)
    limit = model.config.max_position_embeddings
    if model.config.learned_positions and cache.length + ids_BT.shape[1] > limit:
        raise SettingsError(
            f"the model has learned {limit} positions (max_position_embeddings) and cannot go beyond; shorten the prompt or "
            "max_new_tokens"
        )
    lengths = torch.as_tensor(cache.lengths_B, device=ids_BT.device).view(-1, 1)
    positions_BT = (lengths + torch.arange(ids_BT.shape[1], device=ids_BT.device)).expand_as(ids_BT)
    return model(ids_BT, Sequence(positions_BT, cache=cache))


def penalised(logits_W: Tensor, seen_W: Tensor, penalty: float) -> Tensor:
    """Logits of words that were seen, less likely by a factor (CTRL, Keskar 2019, section 4.1;
    negative ones grow)."""
    return torch.where(
        seen_W, torch.where(logits_W < 0, logits_W * penalty, logits_W / penalty), logits_W
    )


def draw(logits_W: Tensor, sampling: Sampling, chance: torch.Generator) -> int:
    """An id by its probability among those that top_k, top_p and min_p leave, in fp64 on the CPU:
    the same on every device.

    min_p: those at least so likely as this share of the likeliest (Nguyen 2024). Raises
    CheckpointError for logits that are NaN.
    """
    logits_W = logits_W.cpu()
    if logits_W.isnan().any():
        raise CheckpointError(
            "the model's logits are NaN: its weights are broken, or training diverged; take an earlier --step"
        )
    if sampling.temperature == 0:
        return int(logits_W.argmax())
    logits, ids = likeliest(logits_W, sampling.top_k)
    p = (logits.double() / sampling.temperature).softmax(-1)
    before = p.cumsum(-1) - p
    p = p[(before < sampling.top_p) & (p >= sampling.min_p * p[0])]  # the likeliest always stays
    place = torch.rand((), generator=chance, dtype=torch.float64) * p.sum()
    return int(ids[min(int(torch.searchsorted(p.cumsum(-1), place, right=True)), len(p) - 1)])


def likeliest(logits_W: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest (0: all), largest first, and their ids; of equals the lower ids."""
    if not 0 < k < len(logits_W):
        return logits_W.sort(descending=True, stable=True)
    ids = (logits_W >= logits_W.topk(k).values[-1]).nonzero()[
        :, 0
    ]  # sorting all words takes longer than a small model
    logits, order = logits_W[ids].sort(descending=True, stable=True)
    return logits[:k], ids[order[:k]]


class Reader:
    """Text of ids as they are drawn, in whole characters, up to a stop.

    What may be the beginning of a stop, or of a character, is held back. Each step decodes from the
    last shown piece on, with that piece before it: decoders treat a text's beginning otherwise.
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
        """What may be shown after this id; sets `ended` when a stop is complete."""
        self.ids.append(drawn)
        before = self.tokenizer.decode(self.ids[: self.shown])
        text = self.tokenizer.decode(self.ids)
        if len(text) <= len(before) or text.endswith(UNFINISHED):
            return ""
        self.ids, self.shown = self.ids[self.shown :], len(self.ids) - self.shown
        return self.until_stop(text[len(before) :])

    def rest(self) -> str:
        """What was held back, at the end of all ids."""
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
        begun = (
            n
            for s in self.stops
            for n in range(min(len(s) - 1, len(self.held)), 0, -1)
            if self.held.endswith(s[:n])
        )
        safe = len(self.held) - max(begun, default=0)
        shown = self.held[:safe]
        self.held = self.held[safe:]
        return shown


def text_row(
    model: Model, tokenizer: Tokenizer, ids: list[int], sampling: Sampling, index: int = 0
) -> Row:
    """A row whose ids are read as text; EOS, other ends of the model's files and stops end it."""
    words = min(tokenizer.vocab_size, model.config.vocab_size)
    return Row(
        ids, sampling, tokenizer.end_ids, words, index, Reader(tokenizer, ids, sampling.stop)
    )


def write(
    model: Model, rows: list[Row], cache: Cache | None = None, pace: Pace | None = None
) -> Iterator[tuple[Row, str]]:
    """(row, text) in pieces, each as soon as it can be shown."""
    for row, drawn in steps(model, rows, cache, pace):
        text = row.reader.push(drawn)
        row.over = row.over or row.reader.ended
        if text:
            yield row, text
    for row in rows:
        if text := row.reader.rest():
            yield row, text


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
    row = text_row(model, tokenizer, prompt_ids(tokenizer, prompt, add_bos), sampling, index)
    return (text for _, text in write(model, [row], pace=pace))


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
    """The text that continues each prompt, in their order, `batch_size` rows at a time; the same
    for any batch_size."""
    for first in range(0, len(prompts), batch_size):
        some = enumerate(prompts[first : first + batch_size], first)
        rows = []
        for i, p in some:
            rows.append(text_row(model, tokenizer, prompt_ids(tokenizer, p, add_bos), sampling, i))
        yield from written(model, rows, pace)


def written(model: Model, rows: list[Row], pace: Pace | None = None) -> list[str]:
    """The whole text of each row."""
    texts = dict.fromkeys(rows, "")
    for row, text in write(model, rows, pace=pace):
        texts[row] += text
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
            "the prompt is empty, and the tokenizer has neither BOS nor EOS to begin with: give some text"
        )
    return ids


def begins_with_bos(opened: Opened) -> bool:
    """Whether the model's documents began with BOS: as its run says, else as the files of its
    tokenizer do."""
    if opened.run:
        return opened.run.tokenizer.add_bos
    return opened.tokenizer.adds_bos
