"""What every test shares: one thread, and tiny models that are structurally whole."""

import os
import random
import time

import hypothesis
import pytest
import torch

from longfire.config.model_config import ModelConfig, mixer_of
from longfire.initialise import build, keyed_generator
from longfire.messages import show_messages
from longfire.model import Model
from longfire.ops import bf16, forms

torch.set_num_threads(1)

# How long an example takes says nothing of the code: CI's machines are busy.
hypothesis.settings.register_profile("without_deadline", deadline=None)
hypothesis.settings.load_profile("without_deadline")

# tests/null_gpu/README.md: a stand-in for a GPU, started by `make null-gpu`
collect_ignore = [] if "LONGFIRE_NULL_GPU" in os.environ else ["null_gpu"]
# our Triton kernels on the CPU; the variable must be set before triton is imported: `make triton`
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore.append("triton_interpreter")

MIXER_SETTINGS = {
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "linear_attention": {"num_heads": 2},
    "retention": {"num_heads": 2},
    "gla": {"num_heads": 2, "use_short_conv": True},
    "delta_net": {"num_heads": 2},
    "gated_delta_net": {"num_heads": 2, "head_dim": 8},
    "kda": {"num_heads": 2, "head_dim": 8},
    "hgrn2": {"expand_ratio": 16, "use_short_conv": True},
    "mamba": {"state_size": 6, "dt_rank": 3},
    "rwkv7": {
        "head_dim": 8,
        "decay_low_rank_dim": 6,
        "a_low_rank_dim": 5,
        "v_low_rank_dim": 4,
        "gate_low_rank_dim": 7,
    },
    "gsa": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "num_slots": 12,
        "feature_map": "t2r",
        "use_short_conv": True,
    },
    "mamba2": {"head_dim": 16, "state_size": 12, "n_groups": 2},
}

# The blocks of the families whose blocks are not Llama's, for models of one mixer.
BLOCK_SETTINGS = {
    "mamba": {"mlp": "none"},
    "mamba2": {"mlp": "none"},
    "rwkv7": {"mlp": "channel_mix", "norm": "layernorm", "embed_norm": True, "norm_eps": 1e-5},
}


def tiny_config(*layer_types: str, **changes) -> ModelConfig:
    """A two-layer (or one layer a type) model of hidden size 32 and 97 words."""
    types = layer_types or ("gla", "attention")
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": max(2, len(types)),
        "layer_types": types,
        "intermediate_size": 48,
        "vocab_size": 97,
        "mixers": {name: dict(MIXER_SETTINGS[mixer_of(name)]) for name in types},
    }
    own = BLOCK_SETTINGS.get(types[0], {}) if len(set(types)) == 1 else {}
    return ModelConfig(**{**fields, **own, **changes})


def tiny_model(*layer_types: str, seed: int = 0, device: str = "cpu", **changes) -> Model:
    """`tiny_config` built, with parameters large enough that every one of them matters: none that is zero."""
    model = build(tiny_config(*layer_types, **{"initializer_range": 0.2, **changes}), seed, device)
    for name, parameter in model.named_parameters():
        if not parameter.any():
            parameter.data += 0.2 * torch.randn(
                parameter.shape, generator=keyed_generator(seed, name)
            ).to(device)
    return model


def pytest_addoption(parser):
    parser.addoption(
        "--bf16-units",
        choices=("no", "yes", "found"),
        default="no",
        help="what tests that do not state it take this CPU for: one with bf16 matrix units or without, or what it is",
    )

    parser.addoption(
        "--until",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="skip tests that would begin later than this (seconds since 1970); files run in another order each time",
    )


def pytest_collection_modifyitems(config, items):
    """Where time may not be enough for all, no file is always among the last. All workers of a run draw the same order."""
    until = config.getoption("--until")
    if until:
        files = sorted({item.path for item in items})
        random.Random(until).shuffle(files)
        items.sort(key=lambda item: files.index(item.path))


def pytest_runtest_setup(item):
    until = item.config.getoption("--until")
    if until and time.time() > until:
        pytest.skip("no time left (--until)")


def pytest_configure(config):
    """No test depends on the kind of CPU: whether it has bf16 units is stated, not found. (What starts a new process states the
    compute type in its recipe.)"""
    units = config.getoption("--bf16-units")
    if units != "found":
        bf16.assume(units == "yes")


@pytest.fixture
def in_fp32():
    """For tests that compare fp32 numbers of a run whose compute type is left to `auto`."""
    with bf16.assumed(False):
        yield


@pytest.fixture(autouse=True)
def forget_choices():
    """Which kernels run is decided once a process: no test decides it for the next one."""
    yield
    forms.decided.clear()


@pytest.fixture(autouse=True)
def messages_on_the_console():
    """Messages are shown as the commands show them, whatever a test before has asked for."""
    show_messages()


@pytest.fixture(name="tiny_config")
def tiny_config_fixture():
    return tiny_config


@pytest.fixture(name="tiny_model")
def tiny_model_fixture():
    return tiny_model
