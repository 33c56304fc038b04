"""Distillation: what is compared, what learns, sums over real tokens, and that a mixer comes nearer to the attention it replaces."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from longfire.checkpoint.state import State
from longfire.config.run import Run
from longfire.config.settings import Distillation as Wanted
from longfire.config.settings import Optimizer, Training
from longfire.data.batch import Batch
from longfire.data.tokenizer import bytes_tokenizer
from longfire.device import Clock
from longfire.errors import SettingsError
from longfire.huggingface.convert import convert_weights
from longfire.huggingface.export import export
from longfire.ops.documents import Documents
from longfire.optim import make_optimizer
from longfire.parallel.activation_offload import ActivationOffload
from longfire.parallel.mesh import ALONE
from longfire.training.distillation import Distillation
from longfire.training.step import train_step

pytestmark = pytest.mark.dtype

GLA = {"num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0, "expand_v": 1.0}


def a_batch(rows=4, seed=0) -> Batch:
    """Two documents a row, a few labels left out."""
    ids_BT = torch.randint(97, (rows, 41), generator=torch.Generator().manual_seed(seed))
    labels_BT = ids_BT[:, 1:].clone()
    labels_BT[0, 5:30] = -100
    first, second = torch.arange(15), torch.arange(25)
    documents = Documents.from_ids(
        torch.cat([first * 0, second * 0 + 1]).expand(rows, -1).contiguous()
    )
    return Batch(ids_BT[:, :-1], labels_BT, torch.cat([first, second]).expand(rows, -1), documents)


@pytest.fixture
def models(tiny_model):
    """A teacher of softmax attention with a soft cap of its logits, and a student whose middle layer is gla."""
    teacher = tiny_model("attention", num_hidden_layers=3, final_logit_softcapping=3.0)
    mixers = {**teacher.config.mixers, "gla": GLA}
    shape = replace(teacher.config, layer_types=("attention", "gla", "attention"), mixers=mixers)
    return teacher, convert_weights(teacher, shape, 0)[0]


def distillation(teacher, **wanted) -> Distillation:
    return Distillation(teacher, Wanted(teacher="there", **wanted), chunk_tokens=16)


def test_hidden_compares_what_the_mixers_say_to_what_the_teachers_attention_saw(models):
    teacher, student = models
    learn, batch = distillation(teacher, kind="hidden"), a_batch()
    heard = []
    hook = teacher.layers[1].mixer.register_forward_hook(
        lambda _, seen, said: heard.append((*seen, said))
    )
    teacher(batch.ids_BT, seq := learn_sequence(batch))
    hook.remove()
    seen, _, said = heard[0]
    student.prepare(seq)
    errors = (student.layers[1].mixer(seen, seq) - said).square().sum(-1) / said.square().sum(-1)
    torch.testing.assert_close(
        learn.loss_sum(student, batch, None), errors[batch.labels_BT != -100].sum()
    )


def learn_sequence(batch):
    from longfire.mixers.mixer import Sequence

    return Sequence(batch.positions_BT, batch.documents)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_logits_is_the_divergence_at_a_temperature_and_a_share_of_the_text(models, share):
    teacher, student = models
    batch, seq = a_batch(), learn_sequence
    learn = distillation(teacher, kind="logits", temperature=2.0, ce_weight=share)
    real = batch.labels_BT != -100
    hidden = (model.head(model(batch.ids_BT, seq(batch)))[real] for model in (teacher, student))
    p, q = (3 * torch.tanh(logits / 3) for logits in hidden)
    expected = 4 * F.kl_div(
        (q / 2).log_softmax(-1), (p / 2).log_softmax(-1), log_target=True, reduction="sum"
    )
    expected = (1 - share) * expected + share * F.cross_entropy(
        q, batch.labels_BT[real], reduction="sum"
    )
    loss = learn.loss_sum(student, batch, None)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for got, true in zip(
        *(torch.autograd.grad(x, list(student.parameters())) for x in (loss, expected))
    ):
        torch.testing.assert_close(got, true, rtol=1e-3, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_microbatches_add_up(models, kind):
    teacher, student = models
    learn, batch = distillation(teacher, kind=kind, ce_weight=0.5), a_batch()
    whole = learn.loss_sum(student, batch, None)
    torch.testing.assert_close(
        whole, sum(learn.loss_sum(student, part, None) for part in batch.split(2))
    )


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_what_waits_on_the_host_changes_nothing(models, kind):
    teacher, student = models
    learn, batch = distillation(teacher, kind=kind, ce_weight=0.5), a_batch()
    learn.loss_sum(student, batch, None).backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    student.saved_activations = ActivationOffload(window_bytes=2**12)  # a few tensors
    learn.loss_sum(student, batch, None).backward()
    learned = 0
    for name, parameter in student.named_parameters():
        if expected[name] is not None:
            assert parameter.grad.equal(expected[name]), name
            learned += 1
    assert learned > 3


@pytest.mark.parametrize("kind, learns", [("hidden", "only new mixers"), ("logits", "everything")])
def test_what_learns(models, kind, learns):
    teacher, student = models
    learn = distillation(teacher, kind=kind)
    learn.prepare(student)
    state = State(student, make_optimizer(student, Optimizer(lr=1e-2), torch.device("cpu")))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    theirs = [p.detach().clone() for p in teacher.parameters()]
    losses = [
        train_step(
            state,
            [a_batch(seed=i % 3)],
            1e-2,
            Training(),
            Clock(torch.device("cpu")),
            learn.loss_sum,
        )["loss"]
        for i in range(30)
    ]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    moved = {name for name, p in student.named_parameters() if not p.equal(before[name])}
    assert moved == {n for n in before if learns == "everything" or n.startswith("layers.1.mixer.")}
    assert all(p.equal(was) for p, was in zip(teacher.parameters(), theirs))


def test_what_does_not_go_together_is_named(models, tiny_model):
    teacher, _ = models
    with pytest.raises(SettingsError, match="every layer of the student has the teacher's own"):
        distillation(teacher, kind="hidden").prepare(tiny_model("attention", num_hidden_layers=3))
    with pytest.raises(SettingsError, match="num_hidden_layers = 3, the student 2"):
        distillation(teacher, kind="hidden").prepare(tiny_model("gla"))
    with pytest.raises(SettingsError, match="vocab_size = 97, the student 98"):
        distillation(teacher).prepare(tiny_model("gla", vocab_size=98))


def test_the_teacher_is_read_from_a_folder(tmp_path, tiny_model):
    assert Distillation.of_run(Run.compose(None, {"model.config": "gla-340m"}), ALONE) is None
    teacher = tiny_model("attention", vocab_size=258)
    export(teacher, bytes_tokenizer(), tmp_path / "teacher")
    named = {"model.config": "gla-340m", "distillation.teacher": str(tmp_path / "teacher")}
    run = Run.compose(None, named)
    learn = Distillation.of_run(run, ALONE)
    for ours, theirs in zip(learn.teacher.parameters(), teacher.parameters()):
        assert ours.equal(theirs) and not ours.requires_grad
