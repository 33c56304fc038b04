"""Whether a model finds again what it has read: pairs of random words (MQAR), and a sentence hidden
in real text (the needle)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.data.tokenizer import Tokenizer
from longfire.data.tokens import TokenStream
from longfire.errors import DataError, SettingsError
from longfire.loss import losses, losses_of
from longfire.mixers.mixer import Sequence
from longfire.model import Model

PLACES = (
    "Lisbon",
    "Nairobi",
    "Oslo",
    "Quito",
    "Hanoi",
    "Cairo",
    "Dublin",
    "Lima",
    "Kyoto",
    "Sofia",
    "Perth",
    "Accra",
)
SENTENCE = "\nThe secret number of {place} is"
ANSWER = " {number}"
END = ".\n"


def mqar(rows: int, tokens: int, pairs: int, words: int, seed: int, power: float = 0.01) -> Batch:
    """Multi-query associative recall (Arora 2023, "Zoology", section 3 and appendix A): pairs of a
    key and its value, then each key once more, whose label is its value; nothing else has a label.

    Keys are drawn from the lower half of the words, values from the upper, both without repetition.
    How far behind the pairs a key comes again follows a power law (a / distance^(1 - a), a =
    `power`); between them stand random words. With pairs = 2:

        ids     k1 v1 k2 v2 .. k2 .. .. .. k1 ..
        labels                 v2          v1
    """
    if tokens % 2 or 4 * pairs > tokens or words // 2 <= pairs:
        raise SettingsError(
            f"MQAR: {pairs} pairs need an even number of at least {4 * pairs} tokens and more than {2 * pairs + 1} words, not "
            f"{tokens} and {words}"
        )
    chance = np.random.default_rng(seed)
    half = words // 2
    before = 2 * pairs
    keys = 1 + distinct(chance, rows, np.ones(half - 1), pairs)
    values = half + distinct(chance, rows, np.ones(words - half), pairs)
    spaces = np.arange(1, (tokens - before) // 2 + 1)
    places = before + 2 * distinct(chance, rows, power * spaces ** (power - 1), pairs)
    ids_BT = chance.integers(words, size=(rows, tokens))
    ids_BT[:, 0:before:2], ids_BT[:, 1:before:2] = keys, values
    labels_BT = np.full((rows, tokens), NO_LABEL)
    np.put_along_axis(ids_BT, places, keys, 1)
    np.put_along_axis(labels_BT, places, values, 1)
    positions_BT = torch.arange(tokens).expand(rows, -1)
    return Batch(torch.from_numpy(ids_BT), torch.from_numpy(labels_BT), positions_BT)


def distinct(chance: np.random.Generator, rows: int, weights: np.ndarray, count: int) -> np.ndarray:
    """(rows, count) different numbers below len(weights) in each row, drawn one after the other by
    their weights: the order of exponential times with these rates."""
    return np.argsort(chance.exponential(size=(rows, len(weights))) / weights, 1)[:, :count]


@torch.no_grad()
def accuracy(model: Model, batch: Batch, chunk_tokens: int = 1024) -> float:
    """Share of the labels that are the model's likeliest word."""
    batch = batch.to(next(model.parameters()).device)
    right_BT = losses(model, batch, chunk_tokens)[1]
    return float(right_BT.sum() / (batch.labels_BT != NO_LABEL).sum())


@dataclass(frozen=True)
class Cell:
    """Needles of one length and depth. Nats are those of the whole answer, means over the
    needles."""

    length: int
    depth: float
    needles: int
    nats: float  # -log p(answer), the needle in the text
    nats_without: float  # the same text without it
    repeated: float  # share of answers that greedy decoding would write

    @property
    def gain(self) -> float:
        """By how many nats the needle makes the answer likelier: 0 for a model that does not
        look."""
        return self.nats_without - self.nats


@dataclass(frozen=True)
class Needle:
    """A needle in a haystack (Kamradt 2023): a sentence with a number is put into real text, at the
    end the sentence begins again.

    Every answer is scored twice, after the text with the needle and after as many tokens of it
    without, so that a model that only guesses digits gains nothing. An answer is repeated when each
    of its words is the likeliest after those before it, which is what greedy decoding would write.
    """

    model: Model
    tokenizer: Tokenizer
    text: TokenStream
    add_bos: bool = False

    def measure(
        self,
        lengths: Iterable[int],
        depths: Iterable[float],
        needles: int,
        batch_size: int,
        seed: int = 0,
    ) -> list[Cell]:
        """A cell for each length (tokens of a row, all included) and depth. Raises SettingsError
        and DataError."""
        if self.model.config.learned_positions:
            limit = self.model.config.max_position_embeddings
        else:
            limit = 0
        if limit and max(lengths) > limit:
            raise SettingsError(
                f"--lengths {max(lengths)}: the model has learned {limit} positions; ask for no more"
            )
        found: list[Cell] = []
        for length in lengths:
            for depth in depths:
                found.append(self.cell(length, depth, needles, batch_size, seed))
        return found

    def cell(self, length: int, depth: float, needles: int, batch_size: int, seed: int) -> Cell:
        rows = [row for number in range(needles) for row in self.rows(length, depth, number, seed)]
        found = []
        for first in range(0, len(rows), batch_size):
            for scored in self.scores(rows[first : first + batch_size]):
                found.append(scored)
        nats, without = (np.mean([nats for nats, _ in found[part::2]]) for part in (0, 1))
        return Cell(
            length,
            depth,
            needles,
            float(nats),
            float(without),
            float(np.mean([hit for _, hit in found[::2]])),
        )

    def rows(
        self, length: int, depth: float, number: int, seed: int
    ) -> Iterator[tuple[list[int], int]]:
        """(ids, how many at their end are the answer) with the needle and without it."""
        chance = np.random.default_rng([seed, number])
        place = PLACES[number % len(PLACES)]
        secret = int(chance.integers(10**5, 10**6))
        said, answer, end = (
            self.tokenizer.encode(part.format(place=place, number=secret))
            for part in (SENTENCE, ANSWER, END)
        )
        bos = [self.tokenizer.bos_id] if self.add_bos and self.tokenizer.bos_id is not None else []
        needle = [*said, *answer, *end]
        room = length - len(bos) - len(said) - len(answer)
        if room < 2 * len(needle):
            raise SettingsError(
                f"--lengths {length}: a needle of {len(needle)} tokens cannot hide there; ask for more"
            )
        if self.text.length < room:
            raise DataError(
                f"{self.text.length:,} tokens of text cannot hide a needle in {length:,}; name more with --data"
            )
        first = int(chance.integers(self.text.length - room + 1))
        text = self.text.tokens(first, first + room).tolist()
        cut = round(depth * (room - len(needle)))
        hidden = [*text[:cut], *needle, *text[cut : room - len(needle)]]
        for hay in (hidden, text):
            yield [*bos, *hay, *said, *answer], len(answer)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def scores(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of rows of one length: (-log p(answer), whether greedy decoding would write it)."""
        device = self.model.embed.weight.device
        ids_BT = torch.tensor([ids for ids, _ in rows], device=device)
        positions_BT = torch.arange(ids_BT.shape[1] - 1, device=device).expand(len(rows), -1)
        hidden_BTD = self.model(ids_BT[:, :-1], Sequence(positions_BT))
        longest = max(answer for _, answer in rows)
        labels_BA = ids_BT[:, -longest:].clone()
        for row, (_, answer) in enumerate(rows):
            labels_BA[row, : longest - answer] = NO_LABEL
        nats_BA, right_BA = losses_of(self.model, hidden_BTD[:, -longest:], labels_BA)
        right_BA |= labels_BA == NO_LABEL
        return list(zip(nats_BA.sum(1).tolist(), right_BA.all(1).tolist()))


def needle_table(cells: list[Cell]) -> Table:
    """A line a length, a column a depth: the nats that the needle is worth, and how many answers
    are repeated."""
    depths = sorted({cell.depth for cell in cells})
    table = Table("tokens", *(f"depth {depth:g}" for depth in depths))
    for length in sorted({cell.length for cell in cells}):
        line = {cell.depth: cell for cell in cells if cell.length == length}
        table.add_row(
            f"{length:,}", *(f"{line[d].gain:+.2f}  {line[d].repeated:.0%}" for d in depths)
        )
    return table


def draw_needle(cells: list[Cell]) -> Any:
    """Two maps of length and depth: nats gained, answers repeated."""
    from matplotlib.figure import Figure

    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    drawn = Figure(figsize=(8.6, 3.4), layout="constrained")
    for axes, name, label, limits in zip(
        drawn.subplots(1, 2),
        ("gain", "repeated"),
        ("nats gained", "answers repeated"),
        ((None, None), (0, 1)),
    ):
        values = {(cell.depth, cell.length): getattr(cell, name) for cell in cells}
        grid = np.array([[values[depth, length] for length in lengths] for depth in depths])
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1])
        axes.set(xlabel="tokens", ylabel="depth", title=label)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        drawn.colorbar(image, ax=axes)
    return drawn
