"""Every way to build a block, against the same block written out; dropout, fp32 residual, learned positions, padded words."""

import pytest
import torch
import torch.nn.functional as F

from longfire.config.model_config import ModelConfig
from longfire.config.own_keys import read_own_keys
from longfire.errors import SettingsError
from longfire.initialise import build
from longfire.loss import loss_sum
from longfire.mixers.mixer import Sequence
from longfire.mlps import MLPS
from longfire.ops.sequence_noise import row_noise

pytestmark = pytest.mark.dtype


def block_of(tiny_model, **changes):
    model = tiny_model("gla", **changes)
    seq = Sequence(torch.arange(20)[None])
    return model.layers[0], torch.randn(1, 20, 32), seq


def test_post_norms(tiny_model):
    block, x, seq = block_of(tiny_model, block="post")
    x1 = block.mixer_norm(x + block.mixer(x, seq))
    torch.testing.assert_close(block(x, seq), block.mlp_norm(x1 + block.mlp(x1)))
    model = tiny_model("gla", block="post")
    assert not [name for name, _ in model.named_parameters() if name.startswith("norm.")], (
        "the last block's norm is the last"
    )


def test_parallel(tiny_model):
    block, x, seq = block_of(tiny_model, block="parallel")
    expected = x + block.mixer(block.mixer_norm(x), seq) + block.mlp(block.mlp_norm(x))
    torch.testing.assert_close(block(x, seq), expected)
    tied, x, seq = block_of(tiny_model, block="parallel_tied")
    h = tied.mixer_norm(x)
    torch.testing.assert_close(tied(x, seq), x + tied.mixer(h, seq) + tied.mlp(h))
    assert tied.mlp_norm is None


def test_no_mlp(tiny_model):
    block, x, seq = block_of(tiny_model, mlp="none")
    torch.testing.assert_close(block(x, seq), x + block.mixer(block.mixer_norm(x), seq))


@pytest.mark.parametrize("bias", [False, True])
def test_squared_relu(tiny_model, bias):
    block, x, _ = block_of(tiny_model, mlp="relu2", mlp_bias=bias)
    up, down = block.mlp.up_proj, block.mlp.down_proj
    torch.testing.assert_close(
        block.mlp(x), F.linear(F.relu(F.linear(x, up.weight, up.bias)) ** 2, down.weight, down.bias)
    )
    assert (up.bias is not None) == bias


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norms_without_parameters(tiny_model, norm):
    given = {"attention": {"num_heads": 4, "qk_norm": True}}
    model = tiny_model("attention", norm=norm, norm_affine=False, embed_norm=True, mixers=given)
    assert not [name for name, _ in model.named_parameters() if "norm" in name]
    x = torch.randn(2, 5, 32)
    expected = (
        F.layer_norm(x, (32,), eps=1e-6) if norm == "layernorm" else F.rms_norm(x, (32,), eps=1e-6)
    )
    torch.testing.assert_close(model.norm(x), expected)


def test_layer_norm_without_bias(tiny_model):
    names = {
        name
        for name, _ in tiny_model("attention", norm="layernorm", norm_bias=False).named_parameters()
    }
    assert "norm.weight" in names and "norm.bias" not in names


def test_residual_in_fp32_keeps_what_bf16_loses(tiny_config):
    """2^-10 beside 1 is lost in bf16 (8 bits) and kept in fp32."""
    shape = tiny_config("gla", residual_in_fp32=True)
    model = build(shape, 0, compute_dtype=torch.bfloat16)
    block, x = model.layers[0], torch.ones(1, 3, 32)
    block.mixer.forward = lambda h, seq: torch.full_like(h, 2**-10)
    block.mlp.forward = torch.zeros_like
    assert block(x, Sequence(torch.arange(3)[None])).unique().tolist() == [1 + 2**-10]
    assert model(torch.zeros(1, 3, dtype=torch.long)).dtype == torch.bfloat16


def test_learned_positions_are_of_the_document(tiny_model):
    model = tiny_model("attention", learned_positions=True, max_position_embeddings=16)
    ids_BT, positions_BT = torch.tensor([[5, 6, 7]]), torch.tensor([[3, 0, 1]])
    expected = model.embed(ids_BT) + model.positions(positions_BT)
    torch.testing.assert_close(model.embed_tokens(ids_BT, Sequence(positions_BT)), expected)
    with pytest.raises(SettingsError, match="learned_positions needs max_position_embeddings"):
        tiny_model("attention", learned_positions=True)


@pytest.mark.parametrize("changes", [{}, {"norm_affine": False}, {"norm": "layernorm"}], ids=str)
def test_embed_norm(tiny_model, changes):
    model, ids_BT = tiny_model("gla", embed_norm=True, **changes), torch.tensor([[5, 6, 7]])
    x = model.embed_tokens(ids_BT, Sequence(torch.arange(3)[None]))
    torch.testing.assert_close(x, model.embed_norm(model.embed(ids_BT)))


def test_dropout_comes_behind_the_norm_of_the_embedding(tiny_model):
    """What is kept is the normed value / (1 - p): a norm behind dropout would take that factor out again."""
    model = tiny_model("gla", embed_norm=True, norm_affine=False, embed_dropout=0.5)
    ids_BT, positions_BT = torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None]
    noise_BT = row_noise(0, 0, 1, 4, torch.device("cpu"))
    x = model.embed_tokens(ids_BT, Sequence(positions_BT, noise_BT=noise_BT))
    kept = x != 0
    assert 0 < kept.sum() < x.numel()
    torch.testing.assert_close(x[kept], 2 * F.rms_norm(model.embed(ids_BT), (32,), eps=1e-6)[kept])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mixer", ["attention", "gla", "gsa", "linear_attention", "retention"])
def test_norms_of_q_and_k(tiny_model, mixer, affine):
    """The mixer is what it is without them when its projections already give heads of unit root mean square."""
    given = {mixer: {"num_heads": 2, "qk_norm": True}}
    model = tiny_model(mixer, mixers=given, norm_affine=affine)
    with_norms = model.layers[0].mixer
    names = {name for name, _ in with_norms.named_parameters() if "_norm" in name} & {
        "q_norm.weight",
        "k_norm.weight",
    }
    assert names == ({"q_norm.weight", "k_norm.weight"} if affine else set())
    without = (
        tiny_model(mixer, mixers={mixer: {"num_heads": 2}}, norm_affine=affine).layers[0].mixer
    )
    without.load_state_dict({k: v for k, v in with_norms.state_dict().items() if k not in names})
    x, seq = torch.randn(1, 20, 32), Sequence(torch.arange(20)[None])
    with_norms.prepare(seq)
    expected = with_norms(x, seq)
    for name in ("q_proj", "k_proj"):
        project, norm = getattr(without, name), getattr(with_norms, f"{name[0]}_norm")
        size = getattr(without, "head_dim", None) or without.head_k
        weight = norm.weight if affine else None

        def normed(x, project=project.forward, size=size, weight=weight):
            return F.rms_norm(project(x).unflatten(-1, (-1, size)), (size,), weight, 1e-6).flatten(
                -2
            )

        project.forward = normed
    torch.testing.assert_close(without(x, seq), expected)


def test_padded_vocabulary():
    shape = ModelConfig(32, 1, ("gla",), {"gla": {"num_heads": 2}}, pad_vocab_multiple=64)
    assert (
        shape.with_vocabulary(97).vocab_size == 128 and shape.with_vocabulary(128).vocab_size == 128
    )
    assert shape.with_vocabulary(97).with_vocabulary(97).vocab_size == 128


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block": "sandwich"}, "block = 'sandwich'"),
        ({"dropout": 1.0}, r"dropout = 1.0 must lie in \[0, 1\)"),
        ({"block": "parallel", "mlp": "none"}, "beside the mixer"),
        ({"pad_vocab_multiple": 0}, "pad_vocab_multiple"),
    ],
)
def test_what_cannot_be_is_named(tiny_config, changes, message):
    with pytest.raises(SettingsError, match=message):
        tiny_config("gla", **changes)


def test_an_mlp_that_there_is_not_is_named(tiny_config):
    """Where the model is made, since a plugin may have brought it."""
    with pytest.raises(SettingsError, match="mlp = 'moe' is not one of swiglu"):
        build(tiny_config("gla", mlp="moe"), 0)


def test_variants_have_settings_of_their_own(tiny_config):
    mixers = {"attention": {"num_heads": 4}, "attention:local": {"num_heads": 2, "window_size": 5}}
    shape = ModelConfig(32, 2, ("attention:local", "attention"), mixers, vocab_size=97)
    model = build(shape, 0)
    assert [block.mixer.config.window_size for block in model.layers] == [5, 0]
    again = read_own_keys(shape.to_dict(), "config.json", ("attention",), tuple(MLPS))
    assert again == shape


class TestDropout:
    CHANGES = {
        "dropout": 0.2,
        "embed_dropout": 0.1,
        "mixers": {"attention": {"num_heads": 4, "dropout": 0.1}},
    }

    def loss(self, model, noise_BT, rows=slice(None)):
        from longfire.data.batch import Batch

        ids_BT = torch.randint(97, (4, 21), generator=torch.Generator().manual_seed(0))[rows]
        batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], torch.arange(20).expand(len(ids_BT), -1))
        return loss_sum(model, batch, 64, noise_BT)

    def test_only_with_noise(self, tiny_model):
        model = tiny_model("attention", **self.CHANGES)
        assert model.config.drops
        assert self.loss(model, None) == self.loss(model, None)
        first, second = (self.loss(model, row_noise(seed, 0, 4, 20, "cpu")) for seed in (0, 1))
        assert first != second != self.loss(model, None)

    def test_microbatches_drop_the_same(self, tiny_model):
        model = tiny_model("attention", **self.CHANGES)
        whole = self.loss(model, row_noise(0, 8, 4, 20, "cpu"))
        parts = sum(
            self.loss(model, row_noise(0, 8 + 2 * i, 2, 20, "cpu"), slice(2 * i, 2 * i + 2))
            for i in (0, 1)
        )
        torch.testing.assert_close(whole, parts)

    @pytest.mark.parametrize("mode", ["block", "mlp", "attention"])
    def test_recomputation_drops_the_same(self, tiny_model, mode):
        from longfire.config.settings import ActivationCheckpoint
        from longfire.parallel.apply import parallelize

        gradients = []
        for remat in ("none", mode):
            model = parallelize(
                tiny_model("attention", **self.CHANGES), ActivationCheckpoint(remat), False
            )
            self.loss(model, row_noise(0, 0, 4, 20, "cpu")).backward()
            gradients.append([p.grad for p in model.parameters()])
        for plain, again in zip(*gradients):
            torch.testing.assert_close(plain, again)
