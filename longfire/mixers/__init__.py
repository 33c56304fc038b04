"""The table of mixers: the name that `layer_types` uses -> the class. A new mixer is a new file and one line here."""

from longfire.mixers.attention import Attention
from longfire.mixers.gated_delta_net import GatedDeltaNet
from longfire.mixers.gla import GLA
from longfire.mixers.hgrn2 import HGRN2
from longfire.mixers.mamba2 import Mamba2
from longfire.mixers.mixer import Mixer

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "gla": GLA,
    "gated_delta_net": GatedDeltaNet,
    "hgrn2": HGRN2,
    "mamba2": Mamba2,
}
