"""The table of mixers: the name that `layer_types` uses -> the class. A new mixer is a new file and
one line here.

mixer.py             what a mixer declares, and what travels along the sequence
cache.py             what layers keep between the calls of a generation
attention.py         softmax attention with rotary positions
linear_attention.py  linear attention with a feature map
retention.py         RetNet
gla.py               gated linear attention
gsa.py               gated slot attention
hgrn2.py             HGRN2
mamba.py             Mamba
mamba2.py            Mamba-2
matrix_state.py      what the delta rules share
delta_net.py         DeltaNet
gated_delta_net.py   Gated DeltaNet
kda.py               Kimi delta attention
channel_mix.py       RWKV-7's MLP
rwkv7.py             RWKV-7
"""

from longfire.mixers.attention import Attention
from longfire.mixers.delta_net import DeltaNet
from longfire.mixers.gated_delta_net import GatedDeltaNet
from longfire.mixers.gla import GLA
from longfire.mixers.gsa import GSA
from longfire.mixers.hgrn2 import HGRN2
from longfire.mixers.kda import KDA
from longfire.mixers.linear_attention import LinearAttention
from longfire.mixers.mamba import Mamba
from longfire.mixers.mamba2 import Mamba2
from longfire.mixers.mixer import Mixer
from longfire.mixers.retention import Retention
from longfire.mixers.rwkv7 import RWKV7

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "linear_attention": LinearAttention,
    "retention": Retention,
    "gla": GLA,
    "gsa": GSA,
    "hgrn2": HGRN2,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kda": KDA,
    "rwkv7": RWKV7,
}
