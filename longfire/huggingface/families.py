"""The families of Hugging Face models that longfire can read and write; free of torch.

A family is one entry of a table: which key of its config.json is which setting of ours, which keys
and settings can only have one value, and which prefix of a parameter's name is which of ours. A new
family is a new entry; family_reading.py and family_writing.py read the tables and know none.
"""

from importlib.metadata import version

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.errors import SettingsError
from longfire.huggingface import own_config
from longfire.huggingface.families_blocks import OWN_BLOCKS
from longfire.huggingface.families_fla import FLA
from longfire.huggingface.families_gpt import GPT_FAMILIES
from longfire.huggingface.families_llama import LLAMA_FAMILIES
from longfire.huggingface.family import Config, Family
from longfire.huggingface.family_reading import (
    KEYS_OF_OURS,
    asked_of,
    idle_rope_keys,
    names_of,
    read_family_config,
)
from longfire.huggingface.family_writing import config_of, normalised, refusals

TRANSFORMERS: dict[str, Family] = {**LLAMA_FAMILIES, **GPT_FAMILIES}
# In the order in which a family is chosen for a model: the first that transformers alone can load.
FAMILIES: dict[str, Family] = {**TRANSFORMERS, **FLA, **OWN_BLOCKS}
READ_SOMEWHERE = frozenset().union(*map(names_of, FAMILIES.values()))
WEIGHTS_OF_OTHER_KINDS = ("quantization_config", "compression_config")


def family_of(config: Config, where: str) -> Family:
    """The family that a config.json names, or our own class. Raises SettingsError with the known
    ones."""
    model_type = config.get("model_type")
    if own_config.is_own_export(config):
        return own_config.LONGFIRE
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SettingsError(
            f"{where}: model_type = {model_type!r} is none that longfire can read "
            f"({', '.join(FAMILIES)}, and longfire's own); model.backend = 'transformers' trains "
            "any other class of transformers as it is"
        )
    return FAMILIES[model_type]


VIT = "vit"  # models of images, which are no family of language models


def config_from_hf(config: Config, where: str) -> ModelConfig:
    """The model config that a Hugging Face config.json describes. Raises SettingsError naming a key
    that longfire cannot express."""
    if own_config.is_own_export(config):
        return own_config.read_model_config(config, where)
    if config.get("model_type") == VIT:
        from longfire.huggingface.vit import config_of_vit  # needs the class of transformers

        return config_of_vit(config, where)
    ignored = frozenset(ignored_keys(config, where))
    return read_family_config(family_of(config, where), config, where, ignored)


def ignored_keys(config: Config, where: str) -> list[str]:
    """Flat names of keys that are ignored: the class of transformers does not declare them, and
    nothing else reads them here, or their value asks for nothing; or their kind of rotary positions
    does not use them. Raises SettingsError for an unknown model type."""
    family = family_of(config, where)
    if family.package != "transformers":
        return []
    asked = asked_of(family, config, where)
    known = names_of(family)
    idle = idle_rope_keys(family, asked)
    unread: Config = {}
    for name, value in asked.items():
        if name not in known and not is_read(name, value):
            unread[name] = value
    if not unread:
        return idle
    from longfire.huggingface.undeclared import undeclared

    return undeclared(config["model_type"], unread, known) + idle


def ignored_line(config: Config, where: str) -> list[str]:
    """A line that names the ignored keys of a config.json, if there are any."""
    if config.get("model_type") not in FAMILIES:
        return []
    names = ignored_keys(config, where)
    if not names:
        return []
    return [f"{where}: transformers' class does not use {', '.join(names)}: left out"]


def is_read(name: str, value: object) -> bool:
    """Whether a key changes what a model of another family or of ours is, or what its weights
    are."""
    if value in (None, False, 0):
        return False
    if name == "layer_types" and isinstance(value, list) and set(value) <= {"full_attention"}:
        return False
    return name in READ_SOMEWHERE or name in KEYS_OF_OURS or name in WEIGHTS_OF_OTHER_KINDS


def choose_family(model_config: ModelConfig) -> str:
    """The model_type of the first family that can express a model config, else that of our own
    class."""
    for model_type, reasons in refusals_of_families(model_config).items():
        if not reasons:
            return model_type
    return own_config.MODEL_TYPE


def refusals_of_families(model_config: ModelConfig) -> dict[str, list[str]]:
    """model_type of each family that has one of the model's mixers -> why it cannot express the
    model; no reason where it can."""
    used = {mixer_of(name) for name in model_config.layer_types}
    model_config = normalised(model_config)
    reasons = {}
    for model_type, family in FAMILIES.items():
        if family.mixer in used:
            reasons[model_type] = list(refusals(family, model_config))
    return reasons


def family_named(model_type: str) -> Family:
    """The family that `choose_family` chose."""
    if model_type == own_config.MODEL_TYPE:
        return own_config.LONGFIRE
    return FAMILIES[model_type]


def class_of_export(model_config: ModelConfig) -> str:
    """The class that an export is loaded with; where it is ours, also what the nearest other class
    does not have."""
    if model_config.image_size:
        return "ViTForImageClassification of transformers"
    family = family_named(choose_family(model_config))
    name = f"{family.architecture} of {family.package}"
    if family is not own_config.LONGFIRE:
        return name
    nearest = nearest_family(model_config)
    return (
        f"{name}, since no class of transformers or fla has a model of this shape; nearest: "
        f"{nearest}"
    )


def nearest_family(model_config: ModelConfig) -> str:
    """The family with the fewest reasons against it, and these reasons."""
    reasons = refusals_of_families(model_config)
    if not reasons:
        return f"none, of {', '.join(dict.fromkeys(model_config.layer_types))}"
    model_type = min(reasons, key=lambda name: len(reasons[name]))
    return f"{model_type} ({'; '.join(reasons[model_type])})"


def config_to_hf(
    model_config: ModelConfig,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    length: int = 2048,
    dtype: str = "float32",
) -> Config:
    """The config.json of a model in the family that can express it, else of our own class: the
    inverse of `config_from_hf`.

    length: written as max_position_embeddings where the model sets no limit, since their classes
    need a number (the length that the model was trained at).
    """
    assert model_config.vocab_size > 0, (
        "the tokenizer decides an open vocabulary: config.with_vocabulary(vocab_size)"
    )
    model_type = choose_family(model_config)
    if model_type == own_config.MODEL_TYPE:
        config = own_config.config_of(model_config, length)
    else:
        config = config_of(FAMILIES[model_type], model_type, normalised(model_config), length)
    # No padding token: their embeddings never train its vector, and ours would have to be EOS.
    return {
        **config,
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": version("transformers"),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
    }
