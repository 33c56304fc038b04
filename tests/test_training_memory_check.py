"""training/memory_check.py: a model that cannot fit is refused before it is made."""

from pathlib import Path

import pytest
import torch

from longfire.config.model_config import ModelConfig
from longfire.config.settings import Optimizer
from longfire.errors import SettingsError
from longfire.model import on_meta
from longfire.training import memory_check
from longfire.training.memory_check import check_memory, host_memory_bytes, state_bytes

CPU = torch.device("cpu")


def model_of(hidden_size: int) -> torch.nn.Module:
    config = ModelConfig(
        hidden_size=hidden_size,
        num_hidden_layers=2,
        layer_types=("attention",),
        mixers={"attention": {"num_heads": 4}},
        vocab_size=1000,
    )
    return on_meta(config, torch.float32)


@pytest.mark.parametrize(("name", "bytes_of_a_number"), [("AdamW", 4 + 4 + 8), ("SGD", 4 + 4)])
def test_the_state_is_parameters_gradients_and_moments(name, bytes_of_a_number):
    model = model_of(64)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert state_bytes(model, Optimizer(name=name)) == bytes_of_a_number * numbers


def test_what_does_not_learn_has_no_gradient():
    model = model_of(64).requires_grad_(False)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert state_bytes(model, Optimizer()) == 4 * numbers


def test_a_model_that_cannot_fit_is_refused_with_both_figures(monkeypatch):
    monkeypatch.setattr(memory_check, "host_memory_bytes", lambda: 64 * 10**9)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    model = model_of(2**14)
    needed = state_bytes(model, Optimizer()) / 10**9
    assert 64 < needed < 128
    message = rf"AdamW state of this run are {needed:,.1f} GB, and this machine has 64.0 GB"
    with pytest.raises(SettingsError, match=message):
        check_memory(model, Optimizer(), CPU, on_host=False)
    monkeypatch.setattr(memory_check, "host_memory_bytes", lambda: 128 * 10**9)
    check_memory(model, Optimizer(), CPU, on_host=False)
    teachers = [model_of(2**14).requires_grad_(False)] * 3
    with pytest.raises(SettingsError, match="of this run with its teacher are"):
        check_memory(model, Optimizer(), CPU, on_host=False, frozen=teachers)
    monkeypatch.setenv("WORLD_SIZE", "2")  # both are on this machine
    with pytest.raises(SettingsError, match="of the 2 processes of this machine"):
        check_memory(model, Optimizer(), CPU, on_host=False)


@pytest.mark.parametrize(
    ("content", "limit"), [("1000000\n", 1_000_000), ("max\n", None), (None, None)]
)
def test_the_limit_of_a_container_counts(monkeypatch, tmp_path, content, limit):
    file = tmp_path / "memory.max"
    if content:
        file.write_text(content)
    monkeypatch.setattr(memory_check, "CONTAINER_LIMITS", (Path("/none"),))
    whole = host_memory_bytes()
    monkeypatch.setattr(memory_check, "CONTAINER_LIMITS", (file,))
    assert host_memory_bytes() == (limit or whole)
