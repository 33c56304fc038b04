"""The stages of training.seq_len_schedule (lengths.py) in a model that is being trained."""

import logging

from longfire.checkpoint.state import State
from longfire.config.run import Run
from longfire.mixers.attention import Attention
from longfire.model import Model
from longfire.training import lengths

logger = logging.getLogger(__name__)


def enter_stage(run: Run, state: State) -> bool:
    """Before a step: give the model the RoPE base of the step's stage. Returns whether a stage
    begins with this step, which is then logged."""
    stage = lengths.stage_at(run.training, state.step)
    begins = stage.step == state.step and state.step > 0
    if begins:
        base = f", RoPE base {stage.rope_theta:g}" if stage.rope_theta else ""
        logger.info(f"step {state.step}: sequences of {stage.seq_len:,} tokens from here on{base}")
    set_rope_base(run, state.model, stage.rope_theta)
    return begins


def set_rope_base(run: Run, model: Model, theta: float) -> None:
    """Let the attention layers of the model rotate by this base, and its config name it; 0: leave
    both as they are."""
    if not theta:
        return
    config = run.model_config_with_base(theta)
    model.config = config.with_vocabulary(model.config.vocab_size)
    for block in model.layers:
        if block is not None and isinstance(block.mixer, Attention):
            block.mixer.turn_by(theta)
