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
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longfire.checkpoint.weights import open_model
from longfire.config import settings
from longfire.config.model_config import mixer_of
from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.errors import SettingsError
from longfire.loss import loss_of
from longfire.mixers.mixer import Sequence
from longfire.model import Block, Model
from longfire.ops.cross_entropy import chunk_size
from longfire.ops.linear import in_fp32


class Distillation:
    """What a student learns from a frozen teacher: sums over real tokens, as `loss.loss_sum` gives
    them."""

    def __init__(self, teacher: Model, wanted: settings.Distillation, chunk_tokens: int) -> None:
        self.teacher = teacher.requires_grad_(False)
        self.wanted = wanted
        self.chunk_tokens = chunk_tokens

    @classmethod
    def of_settings(cls, wanted: settings.Distillation, chunk_tokens: int) -> "Distillation | None":
        """None without a teacher. Raises SettingsError or CheckpointError naming what is wrong with
        its folder."""
        if not wanted.teacher:
            return None
        return cls(open_model(Path(wanted.teacher)).model, wanted, chunk_tokens)

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
        pairs = zip(student.config.layer_types, self.teacher.config.layer_types)
        return [layer for layer, pair in enumerate(pairs) if len(set(map(mixer_of, pair))) == 2]

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
        seq = Sequence(batch.positions_BT, batch.documents, noise_BT=noise_BT, ops=batch.ops)
        student.prepare(seq)
        real_BT = batch.labels_BT != NO_LABEL
        total = torch.zeros((), device=real_BT.device)
        for layer, (seen_BTD, wanted_BTD) in zip(layers, recorded):
            seen_BTD = seen_BTD.to(student.compute_dtype)
            got_BTD = in_fp32(mixer_output(block_at(student, layer), seen_BTD, seq))
            wanted_BTD = in_fp32(wanted_BTD)
            size_BT = wanted_BTD.square().sum(-1).clamp_min(1e-12)
            errors_BT = (got_BTD - wanted_BTD).square().sum(-1) / size_BT
            total = total + errors_BT[real_BT].sum()
        return total / len(layers)

    def logits(self, student: Model, batch: Batch, noise_BT: Tensor | None) -> Tensor:
        """(1 - ce_weight) T^2 KL(teacher || student) at temperature T + ce_weight times the
        loss on the labels."""
        with torch.no_grad():
            seq = Sequence(batch.positions_BT, batch.documents, ops=batch.ops)
            taught_BTD = self.teacher(batch.ids_BT, seq)
        seq = Sequence(batch.positions_BT, batch.documents, noise_BT=noise_BT, ops=batch.ops)
        hidden_BTD = student(batch.ids_BT, seq)
        real_BT = batch.labels_BT != NO_LABEL
        hidden_ND = hidden_BTD[real_BT]
        taught_ND = taught_BTD[real_BT]
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
        with torch.no_grad():
            log_p_NW = (self.teacher.logits(taught_ND) / t).log_softmax(-1)
        log_q_NW = (student.logits(hidden_ND) / t).log_softmax(-1)
        return t * t * (log_p_NW.exp() * (log_p_NW - log_q_NW)).sum()


def block_at(model: Model, layer: int) -> Block:
    """A layer of a model that is whole on this process."""
    block = model.layers[layer]
    assert isinstance(block, Block)
    return block


def mixer_output(block: Block, h_BTD: Tensor, seq: Sequence) -> Tensor:
    """The output (B, T, D) of a mixer alone, computed as its block would (activation
    checkpointing)."""
    if block.execution.mixer is None:
        return block.mix(h_BTD, seq)
    return block.execution.mixer(block.mix, h_BTD, seq)


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
