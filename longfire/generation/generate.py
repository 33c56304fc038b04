"""Text that a model continues: one forward over the prompt, then one token at a time from the cache
of the layers.

Several prompts are continued together: each prompt is first fed alone, then the next token of all
is computed at once. Each draws with its own generator, so its text does not depend on the others.
"""

from collections.abc import Iterable, Iterator

from longfire.checkpoint.weights import Opened
from longfire.config.options import Sampling
from longfire.data.tokenizer import Tokenizer
from longfire.errors import SettingsError
from longfire.generation.continuation import Continuation, continuation_of
from longfire.generation.steps import Pace, steps
from longfire.mixers.cache import Cache
from longfire.model import Model


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
    return "".join(
        stream_text(
            model,
            tokenizer,
            prompt,
            sampling or Sampling(),
            add_bos,
        )
    )


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


def written(
    model: Model,
    continuations: list[Continuation],
    pace: Pace | None = None,
) -> list[str]:
    """The whole text of each continuation."""
    texts = dict.fromkeys(continuations, "")
    for continuation, piece in write(model, continuations, pace=pace):
        texts[continuation] += piece
    return list(texts.values())


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: str,
    add_bos: bool = False,
) -> list[int]:
    """Ids of a prompt. An empty one begins as a document does: with BOS, else after the EOS of the
    one before."""
    ids = tokenizer.encode(prompt)
    if add_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if begin is not None:
            return [begin]
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
