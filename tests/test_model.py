"""model.py: shapes, the count of FLOPs against torch's own counter, precision, recomputation and compilation change nothing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longfire.config.settings import ActivationCheckpoint
from longfire.errors import SettingsError
from longfire.initialise import build
from longfire.mixers import MIXERS
from longfire.ops.attention import attention_reference
from longfire.ops.cross_entropy import linear_cross_entropy
from longfire.ops.sequence_ops import LocalSequence
from longfire.parallel.apply import parallelize

pytestmark = pytest.mark.dtype

IDS_BT = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model):
    hidden_BTD = model(IDS_BT[:, :-1])
    loss = linear_cross_entropy(
        hidden_BTD.flatten(0, 1), model.head.weight, IDS_BT[:, 1:].flatten()
    )
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("mixer", MIXERS)
def test_logits_have_the_shape_of_ids_and_words(mixer, tiny_model):
    model = tiny_model(mixer)
    assert model.logits(model(IDS_BT)).shape == (2, 33, 97)


def test_layernorm_and_gelu_blocks_run(tiny_model):
    model = tiny_model("attention", norm="layernorm", mlp="gelu")
    assert loss_and_gradients(model)[1]["layers.0.mlp_norm.bias"].abs().sum() > 0


def test_flops_agree_with_torchs_counter_where_it_sees_all(tiny_model):
    """Softmax with written-out scores: the counter sees every product, and the whole square where we count the causal half."""
    seq_len, model = 32, tiny_model("attention")
    model.local_ops = LocalSequence(attention_reference)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(IDS_BT[:1, :seq_len]))
    attention = model.layers[0].mixer
    per_pair = 4 * attention.config.num_heads * attention.head_dim  # q k^T and p v
    masked_pairs = seq_len * (seq_len - 1) / 2
    counted = counter.get_total_flops() - len(model.layers) * per_pair * masked_pairs
    assert model.flops_per_token(seq_len) * seq_len == pytest.approx(counted)


@pytest.mark.parametrize("mixer", MIXERS)
def test_flops_of_the_projections_are_twice_their_parameters(mixer, tiny_model):
    model = tiny_model(mixer)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert model.flops_per_token(1) >= 2 * (matrices - model.embed.weight.numel())


@pytest.mark.parametrize("mixer", MIXERS)
def test_bf16_activations_stay_close_and_parameters_stay_fp32(mixer, tiny_config):
    shape = tiny_config(mixer)
    full, half = build(shape, 0), build(shape, 0, compute_dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert half(IDS_BT).dtype == torch.bfloat16
    # 8 bits of mantissa over 2 layers: a few times 2^-8 of the hidden scale
    torch.testing.assert_close(half(IDS_BT).float(), full(IDS_BT), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", ["block", "mlp", "attention"])
def test_recomputation_changes_no_bit(mode, tiny_model):
    plain = loss_and_gradients(tiny_model("gla", "gated_delta_net", "attention"))
    again = loss_and_gradients(
        parallelize(
            tiny_model("gla", "gated_delta_net", "attention"),
            ActivationCheckpoint(mode=mode),
            compiled=False,
        )
    )
    assert plain[0] == again[0]
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, again[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer",
    [
        pytest.param(name, marks=[pytest.mark.matrix] * (name not in ("gsa", "kda", "mamba")))
        for name in MIXERS
    ],
)  # others: contracts/test_every_mixer.py
def test_compiled_gradients_equal_eager_ones(mixer, tiny_model):
    eager = loss_and_gradients(tiny_model(mixer))
    compiled = loss_and_gradients(
        parallelize(tiny_model(mixer), ActivationCheckpoint(), compiled=True)
    )
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    for name, gradient in eager[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            compiled[1][name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name
        )


@pytest.mark.parametrize(
    ("types", "settings", "message"),
    [
        (("attention",), {"num_heads": 3}, "num_heads = 3"),
        (("attention",), {"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads = 3"),
        (
            ("attention",),
            {"num_haeds": 4},
            "attention.num_haeds is unknown; did you mean 'num_heads'",
        ),
        (("gla",), {"num_heads": 3}, "hidden_size \\* expand_k"),
        (("gla",), {"num_heads": 2, "feature_map": "tanh"}, "none, relu, relu2, swish"),
        (("gated_delta_net",), {"num_heads": 2}, "head_dim"),
        (("gated_delta_net",), {"num_heads": 2, "head_dim": 8, "num_v_heads": 3}, "num_v_heads"),
    ],
)
def test_a_mixer_that_cannot_be_built_is_reported_by_its_own_names(
    types, settings, message, tiny_config
):
    with pytest.raises(SettingsError, match=message):
        build(tiny_config(*types, mixers={types[0]: settings}), 0)


def test_a_variant_may_go_without_lower_bounds(tiny_model):
    """HGRN2's bounds are the whole model's: they are there if any layer asks, not only if the first does."""
    mixers = {
        name: {"expand_ratio": 16, "use_lower_bound": name != "hgrn2"}
        for name in ("hgrn2", "hgrn2:bounded")
    }
    model = tiny_model("hgrn2", "hgrn2:bounded", mixers=mixers)
    ids_BT = torch.randint(97, (1, 9))
    model.logits(model(ids_BT)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
