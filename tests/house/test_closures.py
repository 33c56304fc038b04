"""The model is read with few files open."""

import pytest
from closures import MIXERS, closure, lines_of, model_with, model_with_all

# Lines that somebody has to open to follow the model with one mixer and the default MLP. Counted are
# all files that imports reach, the ops that the mixer asks for along the sequence, and of each op what
# says what it computes: its signature and its reference. Not counted is what tables and LazyFunctions
# only name, which computes the same: the fast forms (ops/fast/), and variants that a config must ask
# for (scalings of rotary positions, feature maps with parameters). MAX_LINES_WITH_ALL_FORMS counts them:
# all mixers, all MLPs, all forms and all variants. Neither are the rules that refuse a wrong config
# (closures.REFUSALS). Some 1,900 lines are there whatever the mixer.
MAX_LINES_WITH_A_MIXER = 2500
MAX_LINES_WITH_ALL_MIXERS = 6500
# ops/attention_blocks.py (540) is among them since keys before the queries are computed by it; before,
# two files (138) that did the same for them alone were. Our Triton kernels (loss_kernels.py,
# scan_kernels.py, attention_kernels.py) are 1,100 lines. What a planner takes kernels to keep
# (kernel_memory.py, triton_memory.py) are 600, and operators for compiled graphs (fla_functions.py,
# custom_ops.py, known_lengths.py, varlen_attention.py) 600. Gated slot attention as an op of its
# own, with its forms (ops/slot_attention.py,
# fast/slot_attention.py, slot_kernels.py, slot_memory.py), is 350; products with weights that are rounded
# already (linear.py, fast/linear.py) and the forms of a shared vocabulary are 40.
MAX_LINES_WITH_ALL_FORMS = 10640


def test_the_model_with_all_forms_of_ops():
    reached = closure("longfire.model")
    assert lines_of(reached) <= MAX_LINES_WITH_ALL_FORMS, sorted(reached)
    assert {f"longfire.mixers.{name}" for name in MIXERS} <= reached, "it sees every mixer"


def test_the_model_with_all_mixers_and_mlps():
    reached = model_with_all()
    assert lines_of(reached) <= MAX_LINES_WITH_ALL_MIXERS, sorted(reached)
    assert {f"longfire.mixers.{name}" for name in MIXERS} <= reached, "it sees every mixer"


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_model_with_one_mixer(mixer):
    reached = model_with(mixer)
    assert f"longfire.mixers.{mixer}" in reached
    others = {f"longfire.mixers.{name}" for name in MIXERS} - {f"longfire.mixers.{mixer}"}
    assert not others & reached
    assert lines_of(reached) <= MAX_LINES_WITH_A_MIXER, sorted(reached)
