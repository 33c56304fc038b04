"""A plain PyTorch training loop, the peer of bench/quickstart.py: from two text files to bits per byte in so many seconds.

    python bench/plain_loop.py --train train.txt --validation validation.txt --seconds 300

Documents of a file are divided by a NUL character. The model is what short-run speed records have converged on (modded-nanogpt,
nanochat): pre-norm blocks without parameters in their norms, rotary positions, QK-norm, squared ReLU, a soft cap of 15 on the
logits; matrices begin uniform with standard deviation 1/sqrt(fan_in), output projections and head at zero, the embedding at
N(0, 1) behind a norm. AdamW without weight decay, a constant rate that falls linearly to zero over the second half. It imports
nothing of longfire. The last line of its output is JSON.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

VOCABULARY = 2048
HIDDEN, LAYERS, HEADS, MLP_WIDTH = 192, 4, 3, 768
TOKENS, SEQUENCES = 256, 8  # of a sequence; of a step
LEARNING_RATE, WARMUP_STEPS, DECAY_SHARE = 3e-3, 20, 0.5
SOFT_CAP = 15.0


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = matrix(HIDDEN, 3 * HIDDEN)
        self.output = zeros(HIDDEN, HIDDEN)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        q_BTHK, k_BTHK, v_BTHK = self.qkv(x_BTD).unflatten(-1, (3, HEADS, -1)).unbind(2)
        q_BHTK = rotated(norm(q_BTHK).transpose(1, 2), cos_TK, sin_TK)
        k_BHTK = rotated(norm(k_BTHK).transpose(1, 2), cos_TK, sin_TK)
        o_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BTHK.transpose(1, 2), is_causal=True
        )
        return self.output(o_BHTK.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = matrix(HIDDEN, MLP_WIDTH)
        self.down = zeros(MLP_WIDTH, HIDDEN)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x_BTD)).square())


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.attentions = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.mlps = nn.ModuleList(MLP() for _ in range(LAYERS))
        self.head = zeros(HIDDEN, VOCABULARY)
        head_size = HIDDEN // HEADS
        frequencies = 10000 ** (-torch.arange(0, head_size, 2) / head_size)
        angles = torch.arange(TOKENS)[:, None] * frequencies
        self.register_buffer("cos_TK", angles.cos().repeat(1, 2))
        self.register_buffer("sin_TK", angles.sin().repeat(1, 2))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, vocabulary)."""
        length = ids_BT.shape[1]
        x_BTD = norm(self.embedding(ids_BT))
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x_BTD = x_BTD + attention(norm(x_BTD), self.cos_TK[:length], self.sin_TK[:length])
            x_BTD = x_BTD + mlp(norm(x_BTD))
        return SOFT_CAP * torch.tanh(self.head(norm(x_BTD)) / SOFT_CAP)


def matrix(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    bound = math.sqrt(
        3 / inputs
    )  # of a uniform distribution with standard deviation 1/sqrt(inputs)
    nn.init.uniform_(layer.weight, -bound, bound)
    return layer


def zeros(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def rotated(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary positions (Su 2021), half-split."""
    first, second = x_BHTK.chunk(2, -1)
    return x_BHTK * cos_TK + torch.cat([-second, first], -1) * sin_TK


def trained_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """All documents in one stream, each behind an end-of-text token (id 0)."""
    ids: list[int] = []
    for encoded in tokenizer.encode_batch(documents):
        ids.append(0)
        ids.extend(encoded.ids)
    return torch.tensor(ids)


def train(model: Decoder, stream: Tensor, seconds: float) -> tuple[int, int]:
    """Steps and tokens of so many seconds."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.0,
        fused=True,
    )
    generator = torch.Generator().manual_seed(0)
    begun, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - begun) / seconds) < 1:
        starts = torch.randint(len(stream) - TOKENS - 1, (SEQUENCES,), generator=generator)
        sequences = torch.stack([stream[start : start + TOKENS + 1] for start in starts])
        logits_BTV = model(sequences[:, :-1])
        F.cross_entropy(logits_BTV.flatten(0, 1), sequences[:, 1:].flatten()).backward()
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        decay = min(1.0, (1 - done) / DECAY_SHARE)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warmup * decay
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return step, step * SEQUENCES * TOKENS


@torch.no_grad()
def bits_per_byte(model: Decoder, stream: Tensor, size_bytes: int) -> float:
    """Of a whole stream in sequences that do not overlap."""
    nats, count = 0.0, 0
    for start in range(0, len(stream) - 1, TOKENS):
        labels = stream[start + 1 : start + TOKENS + 1]
        logits = model(stream[None, start : start + len(labels)])[0]
        nats += F.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    return nats / count * len(stream) / size_bytes / math.log(2)


def documents_of(path: Path) -> list[str]:
    return [text for text in path.read_text(encoding="utf-8").split("\0") if text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    torch.manual_seed(0)
    texts, validation_texts = documents_of(options.train), documents_of(options.validation)
    tokenizer = trained_tokenizer(texts)
    stream, validation = tokens_of(tokenizer, texts), tokens_of(tokenizer, validation_texts)
    model = Decoder()
    steps, tokens = train(model, stream, options.seconds)
    size_bytes = sum(len(text.encode()) for text in validation_texts)
    score = bits_per_byte(model, validation, size_bytes)
    print(json.dumps({"steps": steps, "tokens": tokens, "bits_per_byte": score}))


if __name__ == "__main__":
    main()
