"""Every spelling of the four frameworks that longfire replaces -> our settings, or the reason why
there is none.

    meaning.py           what a spelling may mean
    flame_accelerate.py  flame on accelerate
    flame_torchtitan.py  flame on torchtitan
    flash_attention_model.py  the keys of flash-attention's model.config
    flash_attention_records.py  flash-attention's callbacks, metrics and loggers
    flash_attention.py   flash-attention's training/
    numbers.py           numbers of a spelling's value
    ring_attention_optimizer.py  RingAttention's optimizers
    ring_attention.py    RingAttention with Blockwise Transformers
    earlier_longfire.py  settings of longfire that have another name now
    experiments.py       flash-attention's `experiment=`
    listing.py           the tables as rows, for the help and the migration page
    translate.py         the tables together; old words for a value; a spelling -> settings

A value of such a table is
    a key       the same meaning under our name
    a function  from the old value to our {key: value}, where one old setting says several things
    Refused     no such thing here: any value but a harmless one (the old default) is an error
    Dropped     nothing to set: what it asked for holds here anyway; a line says so
"""

from longfire.config.aliases.earlier_longfire import EARLIER_LONGFIRE
from longfire.config.aliases.flame_accelerate import FLAME_ACCELERATE
from longfire.config.aliases.flame_torchtitan import FLAME_TORCHTITAN
from longfire.config.aliases.flash_attention import FLASH_ATTENTION
from longfire.config.aliases.listing import SYSTEMS, rows_of
from longfire.config.aliases.meaning import Dropped, Old, Refused, Started, WithOthers, as_text
from longfire.config.aliases.ring_attention import RING_ATTENTION
from longfire.config.aliases.translate import ALIASES, VALUES, bare_value, translate

__all__ = [
    "ALIASES",
    "EARLIER_LONGFIRE",
    "FLAME_ACCELERATE",
    "FLAME_TORCHTITAN",
    "FLASH_ATTENTION",
    "RING_ATTENTION",
    "SYSTEMS",
    "VALUES",
    "Dropped",
    "Old",
    "Refused",
    "Started",
    "WithOthers",
    "as_text",
    "bare_value",
    "rows_of",
    "translate",
]
