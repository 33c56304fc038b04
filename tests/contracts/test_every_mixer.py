"""Promises 3 (on one process), 5, 9, 10 and 11 for every mixer of the table. A mixer that is added there is tried here, with its
settings in tests/conftest.py; without settings it fails, and so does every one of these tests that it does not pass."""

import pytest
import torch
from conftest import MIXER_SETTINGS, tiny_config, tiny_model
from sets import slow_unless
from torch import Tensor

from longfire.checkpoint.state import State
from longfire.config.settings import ActivationCheckpoint, Optimizer, Training
from longfire.data.batch import Batch
from longfire.data.tokenizer import bytes_tokenizer
from longfire.device import Clock
from longfire.huggingface.export import export
from longfire.huggingface.family_writing import normalised
from longfire.huggingface.load import load_model
from longfire.initialise import build
from longfire.mixers import MIXERS
from longfire.mixers.mixer import Cache, Sequence
from longfire.model import Model
from longfire.ops.choice import choose
from longfire.ops.documents import Documents
from longfire.optim import make_optimizer
from longfire.parallel.apply import parallelize
from longfire.training.step import train_step

CPU = torch.device("cpu")
LENGTHS = (
    5,
    37,
    1,
    70,
    2,
)  # documents shorter and longer than a convolution, a block of the tree and a chunk
TOKENS = sum(LENGTHS)

MIXER_NAMES = list(MIXERS)
each_mixer = pytest.mark.parametrize("mixer", MIXER_NAMES)


def test_every_mixer_has_settings_to_be_tried_with():
    assert MIXERS.keys() <= MIXER_SETTINGS.keys(), "tests/conftest.py: MIXER_SETTINGS lacks a mixer"


def packed(rows: int = 1) -> Sequence:
    ids_BT = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)]).expand(rows, -1)
    positions_BT = torch.cat([torch.arange(n) for n in LENGTHS]).expand(rows, -1)
    return Sequence(positions_BT, Documents.from_ids(ids_BT))


def ids_of(rows: int, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def gradients(model: Model, ids_BT: Tensor, seq: Sequence | None = None) -> dict[str, Tensor]:
    """Of a fixed function of all logits."""
    model.zero_grad()
    logits_BTW = model.logits(model(ids_BT, seq))
    weights = torch.sin(torch.arange(logits_BTW.numel(), dtype=torch.float32)).view_as(logits_BTW)
    (logits_BTW * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_gradients_equal(
    got: dict[str, Tensor], true: dict[str, Tensor], share: float = 1e-3
) -> None:
    """fp32 sums of some 100 terms in another order, relative to each parameter's largest gradient."""
    for name, gradient in true.items():
        assert (got[name] - gradient).abs().max() <= share * gradient.abs().max().clamp_min(1e-6), (
            name
        )


def a_batch(rows: int) -> Batch:
    ids_BT, seq = ids_of(rows, TOKENS + 1), packed(rows)
    labels_BT = ids_BT[:, 1:].clone()
    labels_BT[0, :50] = -100
    return Batch(ids_BT[:, :-1], labels_BT, seq.positions_BT, seq.documents)


def three_steps(
    mixer: str, microbatches: int, remat: str, compiled: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms and parameters of three steps."""
    model = parallelize(
        tiny_model(mixer, initializer_range=0.05), ActivationCheckpoint(remat), compiled
    )
    state = State(model, make_optimizer(model, Optimizer(lr=1e-3, eps=1e-5), CPU))
    batches = a_batch(4).split(microbatches)
    norms = [
        train_step(state, batches, 1e-3, Training(max_norm=0), Clock(CPU))["grad_norm"]
        for _ in range(3)
    ]
    return norms, {name: p.detach() for name, p in model.named_parameters()}


QUICK_PLANS = ((4, "none"), (2, "attention"))
PLANS = [(mixer, *plan) for mixer in MIXER_NAMES for plan in (*QUICK_PLANS, (1, "block"))]


def takes_its_turn(mixer: str, *plan: int | str) -> bool:
    """In `make test` each mixer has one of the plans."""
    return QUICK_PLANS[MIXER_NAMES.index(mixer) % len(QUICK_PLANS)] == plan


@pytest.mark.parametrize(("mixer", "microbatches", "remat"), slow_unless(takes_its_turn, PLANS))
def test_promise_3_no_plan_of_one_process_changes_the_steps(mixer, microbatches, remat):
    (norms, parameters), (true_norms, true) = (
        three_steps(mixer, microbatches, remat),
        three_steps(mixer, 1, "none"),
    )
    assert norms == pytest.approx(true_norms, rel=1e-4)
    for (
        name,
        parameter,
    ) in (
        true.items()
    ):  # Adam moves each number by up to 1e-3 a step, whatever its gradient's rounding
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-4, atol=1e-4, msg=name)


COMPILED = (
    "attention",
    "gla",
    "gated_delta_net",
    "mamba2",
    "rwkv7",
)  # one of each kind of operator: half a minute each


@pytest.mark.parametrize(
    "mixer",
    [
        pytest.param(name, marks=pytest.mark.slow if name in COMPILED else pytest.mark.matrix)
        for name in MIXERS
    ],
)
def test_promise_3_compiling_changes_no_step(mixer):
    (norms, parameters), (true_norms, true) = (
        three_steps(mixer, 1, "none", compiled=True),
        three_steps(mixer, 1, "none"),
    )
    assert norms == pytest.approx(true_norms, rel=1e-3)
    for name, parameter in true.items():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-4, atol=2e-4, msg=name)


@each_mixer
def test_promise_5_a_row_of_documents_equals_the_documents_alone(mixer):
    model, ids_BT = tiny_model(mixer), ids_of(1)
    together = gradients(model, ids_BT, packed())
    logits_BTW = model.logits(model(ids_BT, packed()))
    model.zero_grad()
    weights = torch.sin(torch.arange(logits_BTW.numel(), dtype=torch.float32)).view_as(logits_BTW)
    start = 0
    for length in LENGTHS:
        piece = slice(start, start + length)
        alone_BTW = model.logits(model(ids_BT[:, piece]))
        torch.testing.assert_close(logits_BTW[:, piece], alone_BTW, rtol=1e-4, atol=1e-4)
        (alone_BTW * weights[:, piece]).sum().backward()
        start += length
    assert_gradients_equal(together, {name: p.grad for name, p in model.named_parameters()})


@each_mixer
def test_promise_5_nothing_leaks_from_a_neighbour_by_a_single_bit(mixer):
    """Other tokens before and after a document leave its logits equal to the bit: no small number times a wrong value."""
    model, ids_BT = tiny_model(mixer), ids_of(1, seed=2)
    other_BT = ids_BT.clone()
    other_BT[:, :42], other_BT[:, 43:] = (ids_BT[:, :42] + 1) % 97, (ids_BT[:, 43:] + 5) % 97
    first, second = (model.logits(model(x, packed()))[:, 42:43] for x in (ids_BT, other_BT))
    assert torch.equal(first, second)


@each_mixer
def test_promise_5_the_future_has_exactly_no_gradient(mixer):
    model, ids_BT = tiny_model(mixer), ids_of(1, 70, seed=3)
    embedded_BTD = model.embed(ids_BT).detach().requires_grad_()
    model.embed.forward = lambda _: embedded_BTD
    model.logits(model(ids_BT))[0, 30].sum().backward()
    assert embedded_BTD.grad[0, :31].abs().sum() > 0
    assert embedded_BTD.grad[0, 31:].abs().max() == 0


@each_mixer
def test_promise_9_what_is_exported_comes_back_byte_for_byte(mixer, tmp_path):
    words = bytes_tokenizer()
    model = tiny_model(mixer, vocab_size=words.vocab_size)
    check = export(model, words, tmp_path / "hf")
    assert check.own_kl == 0
    again, _ = load_model(tmp_path / "hf")
    assert normalised(again.config).mixers == normalised(model.config).mixers
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].view(torch.uint8).equal(theirs[name].view(torch.uint8)) for name in ours)


@each_mixer
@torch.no_grad()
@pytest.mark.parametrize("cuts", [[], [1], [64], [3, 70, 71]], ids=str)
def test_promise_10_cached_generation_equals_the_full_forward(mixer, cuts):
    """A prompt in pieces, then token by token."""
    model, ids_BT = tiny_model(mixer), ids_of(2)
    full_BTW = model.logits(model(ids_BT))
    cache, parts = Cache(), []
    cuts = [*cuts, *range(TOKENS - 15, TOKENS)]
    for start, stop in zip([0, *cuts], [*cuts, TOKENS]):
        positions_BT = torch.arange(start, stop).expand(2, -1)
        parts.append(
            model.logits(model(ids_BT[:, start:stop], Sequence(positions_BT, cache=cache)))
        )
    # fp32: sums of up to T + D terms in another order in each of two layers (test_10 derives it), relative to the largest logit
    assert (torch.cat(parts, 1) - full_BTW).abs().max() <= 1e-4 * full_BTW.abs().max()


@each_mixer
def test_promise_11_the_fast_forms_equal_the_slow_ones(mixer):
    """`model.kernels = reference` runs the whole model on the truths alone."""
    shape, ids_BT = tiny_config(mixer, initializer_range=0.2), ids_of(2, 70)
    found = {}
    for wanted in ("torch", "reference"):
        choose(CPU, wanted)
        model = build(shape, 0)
        found[wanted] = (model.logits(model(ids_BT)).detach(), gradients(model, ids_BT))
    (fast_BTW, fast), (slow_BTW, slow) = found["torch"], found["reference"]
    assert (fast_BTW - slow_BTW).abs().max() <= 1e-4 * slow_BTW.abs().max()
    assert_gradients_equal(fast, slow)


@each_mixer
def test_what_is_declared_is_there(mixer):
    """Roles name submodules or parameters that exist under some settings, every matrix has one, FLOPs are counted."""
    model = tiny_model(mixer)
    block = model.layers[0].mixer
    names = [name for name, _ in block.named_parameters()]
    without = [
        name
        for name in names
        if not any(name == role or name.startswith(f"{role}.") for role in block.roles)
    ]
    assert not without, f"roles say nothing of {without}"
    assert set(block.context) and set(block.context) <= {"attention", "state", "halo"}
    assert all(any(name.startswith(leaf) for name in names) for leaf in block.keep_fp32)
    matrices = 2 * sum(p.numel() for p in block.parameters() if p.dim() >= 2)
    assert matrices <= block.flops_per_token(128) <= 20 * matrices
