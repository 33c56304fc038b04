"""ops/choice.py: one decision per op, from the device, what is installed and what was asked for; each with its reason."""

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch

from longfire.errors import SettingsError
from longfire.ops.choice import OF_FLA, OF_TRITON, WITHOUT_KERNEL, choose, describe
from longfire.ops.forms import OPS, Choice, chosen

CPU, CUDA = (
    torch.device("cpu"),
    torch.device("cuda"),
)  # a device is only a name here: nothing is put on it


@pytest.fixture
def installed(monkeypatch):
    """Pretend that just these packages are there."""

    def pretend(*names: str, kernels: ImportError | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: object() if name in names else None
        )

        def import_module(name: str) -> ModuleType:
            assert name == "longfire.ops.fast.kernels"
            if kernels:
                raise kernels
            return ModuleType(name)

        monkeypatch.setattr(importlib, "import_module", import_module)

    return pretend


def test_before_a_choice_it_is_torch():
    assert {chosen(op) for op in OPS} == {"torch"}


@pytest.mark.parametrize("wanted", ["auto", "torch", "reference"])
def test_every_op_gets_one_form_and_a_reason(wanted):
    table = choose(CPU, wanted)
    assert table.keys() == set(OPS)
    assert {choice.name for choice in table.values()} == {
        "reference" if wanted == "reference" else "torch"
    }
    assert all(choice.why for choice in table.values())
    assert all(chosen(op) == choice.name for op, choice in table.items())


def test_a_new_choice_replaces_the_old_one():
    choose(CPU, "reference")
    table = choose(CPU, "torch")
    assert {chosen(op) for op in OPS} == {"torch"}
    table["attention"] = Choice("reference", "changed by the caller")
    assert chosen("attention") == "torch", "the table is the caller's own copy"


def test_cuda_with_fla_takes_its_kernels(installed):
    installed("fla", "triton")
    table = choose(CUDA, "auto")
    assert {op for op in OPS if table[op].name == "fla"} == {*OF_FLA}
    assert {op for op in OPS if table[op].name == "triton"} == {*OF_TRITON}
    assert {table[op].name for op in ("attention", *WITHOUT_KERNEL)} == {"torch"}
    assert "previous_token: torch (a copy of the row" in "\n".join(describe(table))
    assert {choose(CUDA, "torch")[op].name for op in OPS} == {"torch"}


def test_every_op_has_the_forms_it_can_be_given():
    files = {"previous_token": "token_shift", "linear_cross_entropy": "cross_entropy"}
    for op in OPS:
        module = importlib.import_module(f"longfire.ops.{files.get(op, op)}")
        wanted = {"reference", "torch"}
        if op in OF_FLA:
            wanted.add("fla")
        if op in OF_TRITON:
            wanted.add("triton")
        if op in (*OF_FLA, *OF_TRITON):
            wanted.add("memory")
        assert module.FORMS.forms.keys() == wanted, op


@pytest.mark.parametrize(
    "there, missing", [((), "fla"), (("fla",), "triton"), (("triton",), "fla")]
)
def test_cuda_without_a_package_says_what_to_install(installed, there, missing):
    installed(*there)
    table = choose(CUDA, "auto")
    assert (table["linear_cross_entropy"].name == "triton") == ("triton" in there)
    choice = table["delta_rule"]
    assert (
        choice.name == "torch"
        and f"{missing} is not installed" in choice.why
        and "pip install" in choice.why
    )


def test_an_fla_that_cannot_be_imported_is_an_error_not_a_fallback(installed):
    installed("fla", "triton", kernels=ImportError("cannot import name 'chunk_gla'"))
    with pytest.raises(SettingsError, match="chunk_gla.*model.kernels = torch"):
        choose(CUDA, "auto")
    choose(CUDA, "torch")  # the fix that the message names


def test_an_unknown_op_is_our_mistake():
    with pytest.raises(AssertionError, match="matmul"):
        chosen("matmul")
