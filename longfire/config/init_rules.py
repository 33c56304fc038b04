"""How the parameters of a model may begin: the rules that a model's config names (initialise.py
follows them)."""

from longfire.config.model_config import PUBLISHED, ModelConfig
from longfire.errors import SettingsError

INITIALIZER_RANGE = "initializer_range"
BY_DEPTH = "initializer_range_by_depth"
MIXERS_BY_DEPTH = "initializer_range_by_depth_in_mixers"
# Or a number, the standard deviation of a normal distribution.
INIT_RULES = (
    PUBLISHED,
    INITIALIZER_RANGE,
    BY_DEPTH,
    MIXERS_BY_DEPTH,
    "fan_in",
    "fan_in_uniform",
    "zeros",
)
INIT_KEYS = ("init_matrices", "init_outputs", "init_embedding", "init_head")


def check_init(config: ModelConfig) -> None:
    """Raises SettingsError for a rule that is none, or one that nothing would read."""
    known = f"is not one of {', '.join(INIT_RULES)}, or a standard deviation"
    for key in INIT_KEYS:
        rule = getattr(config, key)
        if isinstance(rule, str):
            config.require(key, rule in INIT_RULES, known)
        else:
            deviation = "must be a standard deviation above 0, or 'zeros'"
            config.require(key, 0 < rule < float("inf"), deviation)
        is_for_outputs = rule == MIXERS_BY_DEPTH and key != "init_outputs"
        here = f"is a rule of init_outputs; use {BY_DEPTH!r} here"
        config.require(key, not is_for_outputs, here)
    if config.init_matrices == "zeros":
        raise SettingsError(
            "model config: init_matrices = 'zeros', but an MLP or a recurrence is a product "
            "of its matrices: where all are zero no gradient reaches them, and they never "
            "learn; init_outputs = 'zeros' makes each block begin as the identity"
        )
    # Configs that were written out before `published` was the default name initializer_range.
    defaults = (PUBLISHED, INITIALIZER_RANGE, config.init_embedding)
    if config.tie_word_embeddings and config.init_head not in defaults:
        raise SettingsError(
            f"model config: init_head = {config.init_head!r}, but with tie_word_embeddings = "
            "true the head is the embedding; remove init_head (init_embedding counts), or "
            "set tie_word_embeddings to false"
        )
