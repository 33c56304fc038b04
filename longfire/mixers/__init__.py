"""The table of mixers: the name that `layer_types` uses -> the class, whose file is read when it is
first asked for. A new mixer is a new file and one line here.

mixer.py             what a mixer declares, and what travels along the sequence
cache.py             what layers keep between the calls of a generation
cache_rows.py        rows of caches, as serving needs them: joined, selected
convolved.py         what a mixer projects, after a short convolution if it has one
attention.py         softmax attention with rotary positions
matrix_state.py      queries, keys, values and the output of mixers with a matrix state
linear_attention.py  linear attention with a feature map
retention.py         RetNet
convolved_state.py   the same with short convolutions: GLA, GSA and the delta rules
gla.py               gated linear attention
gsa.py               gated slot attention
hgrn2.py             HGRN2
mamba.py             Mamba
mamba2.py            Mamba-2
delta_net.py         DeltaNet
step_size.py         how the step sizes of Mamba's family begin
gated_delta_net.py   Gated DeltaNet
kda.py               Kimi delta attention
token_lerp.py        tokens moved towards the one before: RWKV-7's mixer and MLP
rwkv7.py             RWKV-7
"""

from longfire.lazy_table import LazyTable
from longfire.mixers.mixer import Mixer

MIXERS: LazyTable[type[Mixer]] = LazyTable(
    {
        "attention": "longfire.mixers.attention:Attention",
        "linear_attention": "longfire.mixers.linear_attention:LinearAttention",
        "retention": "longfire.mixers.retention:Retention",
        "gla": "longfire.mixers.gla:GLA",
        "gsa": "longfire.mixers.gsa:GSA",
        "hgrn2": "longfire.mixers.hgrn2:HGRN2",
        "mamba": "longfire.mixers.mamba:Mamba",
        "mamba2": "longfire.mixers.mamba2:Mamba2",
        "delta_net": "longfire.mixers.delta_net:DeltaNet",
        "gated_delta_net": "longfire.mixers.gated_delta_net:GatedDeltaNet",
        "kda": "longfire.mixers.kda:KDA",
        "rwkv7": "longfire.mixers.rwkv7:RWKV7",
    }
)
