"""What a mixer projects, after a short convolution if it has one."""

from torch import Tensor

from longfire.mixers.mixer import Mixer, Sequence


def convolved(mixer: Mixer, name: str, x_BTD: Tensor, seq: Sequence, silu: bool = True) -> Tensor:
    """x after the short causal convolution `<name>_conv1d` of a mixer, and SiLU with it; x itself
    where the mixer has none."""
    conv = getattr(mixer, f"{name}_conv1d", None)
    if conv is None:
        return x_BTD
    kept = mixer.kept(seq)
    key = f"{name}_conv"
    x_BTD, kept[key] = seq.ops.convolution(
        x_BTD,
        conv.weight[:, 0],
        conv.bias,
        silu=silu,
        state_BDW=kept.get(key),
        documents=seq.documents,
    )
    return x_BTD
