"""huggingface/check.py: the divergence that decides over an export, and what rounding may make of it."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from longfire.data.tokenizer import Tokenizer, bytes_tokenizer
from longfire.errors import CheckpointError
from longfire.huggingface.check import (
    KL_NATS,
    Check,
    compare_imported_tokenizer,
    compare_tokenizer,
    kl,
    tolerated_kl,
)

pytestmark = pytest.mark.dtype

CPU = torch.device("cpu")
LOGITS = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(0))


def test_it_is_the_divergence_of_the_books():
    other = LOGITS + torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(1))
    p, q = (x.double().log_softmax(-1) for x in (LOGITS, other))
    expected = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean().item()
    assert kl(LOGITS, other) == pytest.approx(expected, rel=1e-9)
    assert kl(LOGITS, LOGITS + 3.0) < 1e-12, "a shift of all logits changes no probability"
    assert kl(LOGITS, LOGITS) == 0.0


@pytest.mark.parametrize("shift", [1e-3, 1e-5, 1e-7])
def test_small_differences_are_not_lost_in_the_sum(shift):
    """One logit of a word of probability p moved by d costs p (1 - p) d^2 / 2, far below the last place of a loss."""
    logits = LOGITS.double()[:1, :1]
    moved = logits.clone()
    moved[..., 0] += shift
    p = logits.softmax(-1)[..., 0].item()
    assert kl(logits, moved) == pytest.approx(p * (1 - p) * shift**2 / 2, rel=1e-2)


def test_what_is_not_finite_is_not_the_same():
    broken = LOGITS.clone()
    broken[0, 0, 0] = torch.nan
    assert math.isnan(kl(LOGITS, broken)) and not kl(LOGITS, broken) <= KL_NATS


def test_rounding_is_tolerated_and_a_wrong_model_is_not():
    assert tolerated_kl(LOGITS, 2, CPU) == KL_NATS
    deep = tolerated_kl(100 * LOGITS, 96, CPU)
    assert KL_NATS < deep < 1e-5, "more layers and larger logits round more, but little"
    rounded = LOGITS * (1 + 2**-23 * torch.randn(LOGITS.shape))
    assert kl(LOGITS, rounded) < KL_NATS < kl(LOGITS, LOGITS.bfloat16())


def test_a_check_says_what_was_compared_and_what_was_not():
    whole = Check(12, 34_500_000, "float32", 128, 0.0, "LlamaForCausalLM of transformers", 3e-13)
    assert "12 tensors (34.5 MB, float32) equal byte for byte" in str(whole)
    assert (
        "logits of 128 tokens: ours the same; LlamaForCausalLM of transformers: KL 3.0e-13"
        in str(whole)
    )
    half = Check(
        12, 1, "bfloat16", 128, 2e-5, "GLAForCausalLM of fla", None, "fla is not installed"
    )
    assert "ours KL 2.0e-05 by rounding" in str(half)
    assert "GLAForCausalLM of fla: not compared, fla is not installed" in str(half)


def test_a_tokenizer_that_a_class_of_transformers_makes_anew(tmp_path):
    """GPT2Tokenizer drops the pre-tokenizer of tokenizer.json: the file is taken as it is, and the difference is reported."""
    words = Backend(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(
        ["def f(x):\n    return 12 + 3\n\n  1234567 a\n\n  12\n"] * 50, trainer
    )
    tokenizer = Tokenizer(words, "", "<eos>")
    tokenizer.save(tmp_path)
    assert compare_imported_tokenizer(tokenizer, tmp_path) == ""
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"})
    )
    assert "gives other ids than their tokenizer.json" in compare_imported_tokenizer(
        tokenizer, tmp_path
    )
    with pytest.raises(CheckpointError, match="gives other ids than ours"):
        compare_tokenizer(tokenizer, tmp_path)
    with pytest.raises(CheckpointError, match="gives other ids by transformers than by longfire"):
        compare_imported_tokenizer(bytes_tokenizer(), tmp_path)


def test_a_tokenizer_that_a_class_of_transformers_cannot_read(tmp_path):
    """tokenizers itself raises Exception, of no narrower class."""
    tokenizer = bytes_tokenizer()
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "tokenizer_class": "CodeLlamaTokenizerFast"})
    )
    line = compare_imported_tokenizer(tokenizer, tmp_path)
    assert "AutoTokenizer cannot read these files" in line and "Unk token" in line
    with pytest.raises(CheckpointError, match="cannot read these files"):
        compare_tokenizer(tokenizer, tmp_path)
