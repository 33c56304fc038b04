"""A text while it is generated."""

from collections.abc import Iterable

import torch
from torch import Tensor

from longfire.config.options import Sampling
from longfire.data.tokenizer import Tokenizer
from longfire.generation.draw import draw, penalised
from longfire.generation.reader import Reader
from longfire.initialise import keyed_generator
from longfire.model import Model


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
        reader: Reader | None = None,
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

    def text_reader(self) -> Reader:
        """What turns its ids into text."""
        assert self.reader is not None, "made by continuation_of"
        return self.reader

    def take(self, logits_V: Tensor) -> int | None:
        """Draw the next id and append it; None if it is one that ends the text. logits_V: of the
        whole vocabulary."""
        logits_V = logits_V[: self.vocab_size or None].float().cpu()
        if self.sampling.repetition_penalty != 1:
            if self.seen_V is None:
                known = [i for i in self.ids if i < len(logits_V)]
                self.seen_V = torch.zeros(logits_V.shape, dtype=torch.bool)
                self.seen_V[known] = True
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


def continuation_of(
    model: Model,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: Sampling,
    index: int = 0,
) -> Continuation:
    """The continuation of a prompt as text; EOS, other end tokens of the model's files and stops
    end it."""
    vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    reader = Reader(tokenizer, ids, sampling.stop)
    return Continuation(
        ids,
        sampling,
        tokenizer.end_ids,
        vocab_size,
        index,
        reader,
    )
