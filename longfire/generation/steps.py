"""The steps of a generation: one forward over each prompt, then one token of all texts at a time,
from the cache of the layers."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longfire.errors import SettingsError
from longfire.generation.continuation import Continuation
from longfire.mixers.cache import Cache
from longfire.mixers.cache_rows import memory_bytes, selected, stacked
from longfire.mixers.mixer import Sequence
from longfire.model import Model

# Tokens of a prompt that are fed at once: bounds the memory of long prompts
PROMPT_CHUNK = 2048


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
    cache = caches[0] if len(continuations) == 1 else stacked(caches)
    del caches, own  # a stack is a copy: these would keep the memory
    pace.prompt_seconds += time.perf_counter() - started
    pace.first_bytes = pace.first_bytes or memory_bytes(cache)
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
        going: list[int] = []
        for number, continuation in enumerate(continuations):
            if not continuation.over:
                going.append(number)
        if not going:
            pace.last_bytes = memory_bytes(cache)
            return
        if len(going) < len(continuations):
            cache = selected(cache, going)
            continuations = [continuations[number] for number in going]
        step_started = time.perf_counter()
        logits_BV = advance(model, [one.ids[-1] for one in continuations], cache)


def feed(
    model: Model,
    ids: list[int],
    cache: Cache,
) -> Tensor:
    """Feed more ids of the one sequence in `cache`; returns the logits (V,) of the next id."""
    for start in range(0, len(ids), PROMPT_CHUNK):
        hidden_BTD = hidden_states(model, [ids[start : start + PROMPT_CHUNK]], cache)
    return model.logits(hidden_BTD[:, -1:])[0, 0]


def advance(
    model: Model,
    ids_B: list[int],
    cache: Cache,
) -> Tensor:
    """Feed the next id of every sequence in `cache`; returns the logits (B, V) of the ids after
    them."""
    hidden_B1D = hidden_states(model, [[i] for i in ids_B], cache)
    return model.logits(hidden_B1D)[:, 0]


# a compiled model would be compiled again for every length
@torch.compiler.set_stance("force_eager")
def hidden_states(
    model: Model,
    ids: list[list[int]],
    cache: Cache,
) -> Tensor:
    """Hidden states (B, T, D) of ids (B, T) that follow those in the cache. Raises SettingsError
    beyond learned positions."""
    ids_BT = torch.tensor(ids, device=model.embed.weight.device)
    limit = model.config.max_position_embeddings
    if model.config.learned_positions and cache.length + ids_BT.shape[1] > limit:
        raise SettingsError(
            f"the model has learned {limit} positions (max_position_embeddings) and cannot go "
            "beyond; shorten the prompt or max_new_tokens"
        )
    lengths_B1 = torch.as_tensor(cache.lengths_B, device=ids_BT.device).view(-1, 1)
    new_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    positions_BT = (lengths_B1 + new_T).expand_as(ids_BT)
    return model(ids_BT, Sequence(positions_BT, cache=cache))
