"""The table of MLPs: the name that `mlp` and `mlp_layer_types` use -> the class, whose file is read
when it is first asked for. A new MLP is a new file and one line here.

contract.py     what an MLP declares
reading.py      the own settings of all MLPs of a model, read
gated.py        a gate times what it lets through: swiglu and its like
ungated.py      an activation between two matrices, as in GPT-2
channel_mix.py  RWKV-7's, which looks at the token before
auxiliary.py    losses and statistics that MLPs give beside their outputs
"""

from longfire.config.model_config import NO_MLP, ModelConfig, mlp_of
from longfire.config.own_settings import own_settings
from longfire.errors import SettingsError
from longfire.lazy_table import LazyTable
from longfire.mlps.contract import MLP

MLPS: LazyTable[type[MLP]] = LazyTable(
    {
        "swiglu": "longfire.mlps.gated:GatedMLP",
        "geglu": "longfire.mlps.gated:GatedMLP",
        "geglu_exact": "longfire.mlps.gated:GatedMLP",
        "reglu": "longfire.mlps.gated:GatedMLP",
        "relu": "longfire.mlps.ungated:UngatedMLP",
        "relu2": "longfire.mlps.ungated:UngatedMLP",
        "silu": "longfire.mlps.ungated:UngatedMLP",
        "gelu": "longfire.mlps.ungated:UngatedMLP",
        "gelu_exact": "longfire.mlps.ungated:UngatedMLP",
        "channel_mix": "longfire.mlps.channel_mix:ChannelMix",
    }
)


def make_mlp(model: ModelConfig, layer: int) -> MLP | None:
    """The MLP of a layer. Raises SettingsError for a name or a setting that it does not have."""
    name = model.mlp_types[layer]
    if name == NO_MLP:
        return None
    if mlp_of(name) not in MLPS:
        raise SettingsError(
            f"model config: mlp = {name!r} is not one of {', '.join(MLPS)}, {NO_MLP}"
        )
    mlp_class = MLPS[mlp_of(name)]
    given = model.mlps.get(name, {})
    return mlp_class(model, own_settings(mlp_class, name, given, model.hidden_size), layer)
