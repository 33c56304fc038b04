"""Keys of a config.json that the class of the installed transformers does not declare, so that they
change nothing there."""

from collections.abc import Mapping
from difflib import get_close_matches

from longfire.huggingface.family_reading import INERT

NEAR = 0.85  # difflib's ratio from which a name is taken for a misspelling of another one


def undeclared(
    model_type: str,
    unread: Mapping[str, object],
    known: set[str],
) -> list[str]:
    """Those of `unread` (flat name -> value) that transformers' config class of this model type
    does not declare.

    known: names that the family reads. A name that looks like a misspelling of them, or of a
    declared name, is not taken for harmless.
    """
    # seconds of imports, only where a key is unknown
    from transformers.modeling_rope_utils import RopeParameters
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    declared = set(config_class().to_dict()) | set(config_class.attribute_map)
    declared |= {f"rope_parameters.{name}" for name in RopeParameters.__annotations__}
    names = (declared | known) - set(INERT)  # many of those resemble each other
    found = []
    for name, value in unread.items():
        if name in declared or isinstance(value, dict):
            continue
        if not get_close_matches(name, names - {name}, 1, NEAR):
            found.append(name)
    return found
