"""parallel/context_refusals.py: what cannot be shared along the sequence is refused, with the fix."""

import re

import pytest
from conftest import tiny_config

from longfire.config.settings import Parallelism
from longfire.mixers import MIXERS
from longfire.mixers.gla import GLA
from longfire.model import Model, on_meta
from longfire.parallel.context_refusals import refusals


def refused(model: Model, cp: int, tokens: int = 64, tp: int = 1, **settings: str) -> str:
    settings = {f"context_parallel_{key}": value for key, value in settings.items()}
    return "\n".join(refusals(model, cp, tp, tokens, Parallelism(**settings)))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_can_be_shared(mixer):
    assert refused(on_meta(tiny_config(mixer)), 4) == ""
    assert refused(on_meta(tiny_config("attention:local", mixer)), 8, strategy="ring") == ""


@pytest.mark.parametrize(
    ("cp", "tokens", "tp", "settings", "message"),
    [
        (
            8,
            15,
            1,
            {},
            r"training.seq_len = 15 is shorter than the 16 segments.*context_parallel_degree = 8.*lower the degree",
        ),
        (8, 7, 1, {"layout": "contiguous"}, "seq_len = 7 is shorter than the 8 segments"),
        (
            8,
            64,
            1,
            {"strategy": "alltoall"},
            r"it has 4.*lower parallelism.context_parallel_degree to 4 or less.*ring or allgather",
        ),
        (3, 64, 1, {"strategy": "alltoall"}, "does not divide its 4"),
        (4, 64, 2, {"strategy": "alltoall"}, r"it has 2 \(of a tensor-parallel process\)"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_number_and_mend(cp, tokens, tp, settings, message):
    said = refused(on_meta(tiny_config("gla", "attention")), cp, tokens, tp, **settings)
    assert re.search(message, said), said
    assert refused(on_meta(tiny_config("gla", "attention")), 1, tokens, tp, **settings) == ""


def test_a_mixer_without_a_kind_of_context_is_refused(monkeypatch):
    monkeypatch.setattr(GLA, "context", ())
    assert "gla does not say how it looks along the sequence (context)" in refused(
        on_meta(tiny_config("gla")), 2
    )


def test_a_recurrence_without_a_map_is_refused():
    def own_recurrence():
        raise AssertionError("is not called")

    model = on_meta(tiny_config("gla", "attention"))
    model.layers[0].mixer.recurrences = (own_recurrence,)
    assert "gla.recurrences has own_recurrence, of which no map is known" in refused(model, 2)
    model.layers[0].mixer.recurrences = ()
    assert "gla has a state but does not say of which recurrence" in refused(model, 2)
