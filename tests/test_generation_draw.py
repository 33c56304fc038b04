"""generation/draw.py: ids are drawn by their probabilities, which are those of transformers."""

import math

import pytest
import torch

from longfire.config.options import Sampling
from longfire.errors import CheckpointError
from longfire.generation.draw import draw, penalised

pytestmark = pytest.mark.dtype


def frequencies(sampling: Sampling, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw(logits, sampling, chance) for _ in range(draws)])
    return drawn.bincount(minlength=len(logits)) / draws


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(temperature=1, top_k=0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=1, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_k=0, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_k=0, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(temperature=0.5, top_k=0), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        (Sampling(temperature=1, top_k=0, top_p=1e-9), [0, 1, 0, 0]),
        (Sampling(temperature=1, top_k=0, min_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_k=3, min_p=0.76), [0, 1, 0, 0]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
    ],
)
def test_ids_are_drawn_by_their_probabilities(sampling, expected):
    observed = frequencies(sampling, torch.tensor([0.1, 0.4, 0.2, 0.3]).log())
    for seen, p in zip(observed.tolist(), expected):
        assert abs(seen - p) <= 4 * math.sqrt(
            p * (1 - p) / 4000
        )  # 4 standard deviations; never drawn where p = 0


def test_an_id_without_probability_is_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert frequencies(Sampling(temperature=1, top_k=0), logits, 200).tolist() == [0, 1, 0]


def test_logits_that_are_no_numbers_are_an_error():
    with pytest.raises(CheckpointError, match="NaN"):
        draw(torch.tensor([0.0, math.nan]), Sampling(), torch.Generator())


def left_by_transformers(logits: torch.Tensor, *warpers) -> torch.Tensor:
    """Probabilities after its warpers."""
    scores = logits[None]
    for warper in warpers:
        scores = warper(torch.tensor([[0]]), scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p", [(1.0, 0, 1.0, 0.2), (0.7, 6, 0.8, 0.1), (1.3, 4, 0.9, 0.0)]
)
def test_probabilities_are_those_of_transformers(seed, temperature, top_k, top_p, min_p):
    from transformers.generation import logits_process as theirs

    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(seed))
    warpers = [theirs.TemperatureLogitsWarper(temperature)]
    warpers += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [theirs.MinPLogitsWarper(min_p)] if min_p else []
    expected = left_by_transformers(logits, *warpers)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    observed = frequencies(sampling, logits, 2000)
    for seen, p in zip(observed.tolist(), expected.tolist()):
        assert abs(seen - p) <= 4.5 * math.sqrt(p * (1 - p) / 2000)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 4.0])
def test_repetition_is_penalised_as_in_transformers(penalty):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(40, generator=torch.Generator().manual_seed(3))
    ids = torch.randint(40, (1, 15), generator=torch.Generator().manual_seed(4))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0]
    seen = torch.zeros(40, dtype=torch.bool)
    seen[ids[0]] = True
    assert torch.equal(penalised(logits, seen, penalty), expected)
