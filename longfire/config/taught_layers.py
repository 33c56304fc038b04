"""Which layers of a student learn from a teacher (distillation.kind = hidden)."""

from collections.abc import Sequence

from longfire.config.model_config import mixer_of


def layers_of_other_mixers(student: Sequence[str], teacher: Sequence[str]) -> list[int]:
    """The layers whose mixer is another one than the teacher's, of the layer_types of both."""
    pairs = enumerate(zip(student, teacher))
    return [layer for layer, (mine, other) in pairs if mixer_of(mine) != mixer_of(other)]
