"""Distillation: a student whose new mixers learn first to do what the teacher's attention did, then
to predict what it predicts.

hidden   each new mixer gets the input of the teacher's attention in that layer, and its output is
         compared with the attention's (MOHAWK, Bick 2024, stage 2; attention transfer, LoLCATs,
         Zhang 2024). Only the new mixers learn.
logits   KL(teacher || student) of the next token, mixed with the loss on the text itself (Hinton
         2015). Everything learns.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longfire.config import settings
from longfire.config.run import Run
from longfire.config.taught_layers import layers_of_other_mixers
from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.errors import SettingsError
from longfire.loss import loss_of
from longfire.mixers.mixer import Sequence
from longfire.model import Block, Model
from longfire.ops.cross_entropy import chunk_size
from longfire.ops.divergence import divergence, log_probabilities
from longfire.ops.linear import in_fp32, linear
from longfire.ops.vocabulary import softcapped
from longfire.parallel.mesh import Mesh
from longfire.training.teacher import open_teacher


class Distillation:
    """What a student learns from a frozen teacher: sums over real tokens, as `loss.loss_sum` gives
    them."""

    def __init__(self, teacher: Model, wanted: settings.Distillation, chunk_tokens: int) -> None:
        self.teacher = teacher.requires_grad_(False)
        self.wanted = wanted
        self.chunk_tokens = chunk_tokens

    @classmethod
    def of_run(cls, run: Run, mesh: Mesh) -> "Distillation | None":
        """None without a teacher. Raises SettingsError or CheckpointError naming what is wrong with
        its folder, or why the processes cannot share it."""
        if not run.distillation.teacher:
            return None
        return cls(open_teacher(run, mesh), run.distillation, run.training.loss_chunk_tokens)

    def prepare(self, student: Model) -> None:
        """Check that student and teacher go together, and freeze what does not learn.

        Raises SettingsError naming what differs.
        """
        ours = student.config
        theirs = self.teacher.config
        keys = ["vocab_size"]
        if self.wanted.kind == "hidden":
            keys = ["hidden_size", "num_hidden_layers"]
        for key in keys:
            if getattr(ours, key) != getattr(theirs, key):
                raise SettingsError(
                    f"distillation.teacher has {key} = {getattr(theirs, key)}, the student "
                    f"{getattr(ours, key)}: they must be equal for distillation.kind = "
                    f"{self.wanted.kind!r}; `longfire convert` makes such a student"
                )
        if self.wanted.kind == "hidden":
            new = self.new_layers(student)
            if not new:
                raise SettingsError(
                    "distillation.kind = 'hidden' teaches mixers that replace the teacher's, but "
                    "every layer of the student has the teacher's own; take kind = 'logits'"
                )
            student.requires_grad_(False)
            for layer in new:
                block_at(student, layer).mixer.requires_grad_(True)

    def new_layers(self, student: Model) -> list[int]:
        """Layers whose mixer is another than the teacher's."""
        return layers_of_other_mixers(student.config.layer_types, self.teacher.config.layer_types)

    def loss_sum(self, student: Model, batch: Batch, noise_BT: Tensor | None) -> Tensor:
        """Sum over the batch's real tokens, fp32 scalar: of relative squared errors (hidden), of
        nats (logits)."""
        if self.wanted.kind == "hidden":
            return self.hidden(student, batch, noise_BT)
        return self.logits(student, batch, noise_BT)

    def hidden(self, student: Model, batch: Batch, noise_BT: Tensor | None) -> Tensor:
        """Mean over the new mixers of |student's output - teacher's|^2 / |teacher's|^2, summed over
        real tokens."""
        layers = self.new_layers(student)
        with torch.no_grad(), recording(self.teacher, layers) as recorded:
            self.teacher(batch.ids_BT, Sequence(batch.positions_BT, batch.documents, ops=batch.ops))
        inputs: dict[int, Tensor] = {}
        for layer, (seen_BTD, _) in zip(layers, recorded):
            # a mixer sees whole sequences, of which the student's own way in makes them
            inputs[layer] = student.regions.own_tokens(seen_BTD).to(student.compute_dtype)
        seq = Sequence(batch.positions_BT, batch.documents, noise_BT=noise_BT, ops=batch.ops)
        outputs = student.mix_layers(inputs, seq)
        real_BT = student.regions.own_tokens(batch.labels_BT != NO_LABEL)
        total = torch.zeros((), device=real_BT.device)
        for got_BTD, (_, wanted_BTD) in zip(outputs, recorded):
            got_BTD = in_fp32(got_BTD)
            wanted_BTD = in_fp32(wanted_BTD)
            size_BT = wanted_BTD.square().sum(-1).clamp_min(1e-12)
            errors_BT = (got_BTD - wanted_BTD).square().sum(-1) / size_BT
            total = total + errors_BT[real_BT].sum()
        return student.regions.sum_of_tokens(total / len(layers))

    def logits(self, student: Model, batch: Batch, noise_BT: Tensor | None) -> Tensor:
        """(1 - ce_weight) T^2 KL(teacher || student) at temperature T + ce_weight times the
        loss on the labels."""
        with torch.no_grad():
            seq = Sequence(batch.positions_BT, batch.documents, ops=batch.ops)
            taught_BTD = self.teacher(batch.ids_BT, seq)
        seq = Sequence(batch.positions_BT, batch.documents, noise_BT=noise_BT, ops=batch.ops)
        hidden_BTD = student(batch.ids_BT, seq)
        real_BT = batch.labels_BT != NO_LABEL
        hidden_ND = student.regions.enter(hidden_BTD)[real_BT]
        with torch.no_grad():
            taught_ND = self.teacher.regions.enter(taught_BTD)[real_BT]
        total = torch.zeros((), device=real_BT.device)
        chunk_tokens = chunk_size(self.chunk_tokens, hidden_ND.device)
        chunks = zip(hidden_ND.split(chunk_tokens), taught_ND.split(chunk_tokens))
        for hidden_CD, taught_CD in chunks:
            total = total + checkpoint(
                self.divergence, student, hidden_CD, taught_CD, use_reentrant=False
            )
        weight = self.wanted.ce_weight
        if not weight:
            return total
        on_labels = loss_of(student, hidden_BTD, batch, self.chunk_tokens)
        return (1 - weight) * total + weight * on_labels

    def divergence(self, student: Model, hidden_ND: Tensor, taught_ND: Tensor) -> Tensor:
        """Sum over some tokens of T^2 KL in nats; their logits are recomputed in the backward."""
        t = self.wanted.temperature
        vocabulary = student.regions.vocabulary
        with torch.no_grad():
            log_p_NW = log_probabilities(logits_here(self.teacher, taught_ND) / t, vocabulary)
        log_q_NW = log_probabilities(logits_here(student, hidden_ND) / t, vocabulary)
        return t * t * divergence(log_p_NW, log_q_NW, vocabulary)


def logits_here(model: Model, hidden_ND: Tensor) -> Tensor:
    """Logits (N, W) in fp32 of the words whose rows of the head are on this process, of hidden
    states that have entered the region of the head."""
    if model.head is None:  # a model of transformers gives logits
        return model.logits(hidden_ND)
    logits_NW = in_fp32(linear(hidden_ND, model.head.weight))
    return softcapped(logits_NW, model.config.final_logit_softcapping)


def block_at(model: Model, layer: int) -> Block:
    """A layer of a model that is whole on this process."""
    block = model.layers[layer]
    assert isinstance(block, Block)
    return block


@contextmanager
def recording(model: Model, layers: list[int]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The input and output of the mixers of these layers in a forward inside the block, in
    order."""
    recorded: list[tuple[Tensor, Tensor]] = []

    def record(mixer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        recorded.append((inputs[0], output))

    hooks = [block_at(model, layer).mixer.register_forward_hook(record) for layer in layers]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
