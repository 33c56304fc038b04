"""Forms of ops: found in their own files when they are first asked for, by compiled code too."""

import inspect
import sys
from importlib import import_module

import pytest
import torch

from longfire.ops.choice import choose
from longfire.ops.forms import OPS, Forms, LazyFunction, chosen

CPU = torch.device("cpu")
FILES = {op: op for op in OPS} | {
    "linear_cross_entropy": "cross_entropy",
    "previous_token": "token_shift",
}


@pytest.fixture
def forms(tmp_path, monkeypatch) -> Forms:
    """Two forms of an op in files that nothing has imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, factor in (("slow", 2), ("fast", 3)):
        (tmp_path / f"form_{name}.py").write_text(f"def form(x):\n    return {factor} * x\n")
        monkeypatch.delitem(sys.modules, f"form_{name}", raising=False)
    yield Forms("dplr", reference="form_slow:form", torch="form_fast:form")
    for name in ("slow", "fast"):
        sys.modules.pop(f"form_{name}", None)


def test_a_file_is_imported_when_its_form_is_first_asked_for(forms):
    assert "form_fast" not in sys.modules
    assert forms.chosen()(5) == 15
    assert "form_fast" in sys.modules and "form_slow" not in sys.modules
    choose(CPU, "reference")
    assert forms.chosen()(5) == 10


def test_compiled_code_finds_it_in_one_graph_that_is_made_once(forms):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: forms.chosen()(x).sin(), backend=backend, fullgraph=True, dynamic=False
    )
    x = torch.ones(3)
    for _ in range(3):
        assert torch.equal(compiled(x), (3 * x).sin())
    assert len(graphs) == 1
    choose(CPU, "reference")
    assert torch.equal(compiled(x), (2 * x).sin()), "another choice is another graph"
    assert len(graphs) == 2


def test_a_function_that_is_not_there_is_an_error(forms):
    with pytest.raises(AttributeError, match="nothing"):
        LazyFunction("form_fast:nothing").get()
    with pytest.raises(ImportError):
        LazyFunction("form_missing:form").get()


@pytest.mark.parametrize("op", OPS)
def test_every_form_of_our_own_has_the_signature_of_its_op(op):
    """fla's, too, are of the same arguments; they cannot be imported without fla."""
    module = import_module(f"longfire.ops.{FILES[op]}")
    wanted = inspect.signature(getattr(module, op))
    assert module.FORMS.op == op and {"reference", "torch"} <= module.FORMS.forms.keys()
    for name in ("reference", "torch"):
        form = module.FORMS.forms[name].get()
        assert inspect.signature(form) == wanted, f"{op}, {name}"


def test_an_op_has_a_form_by_default():
    assert [chosen(op) for op in OPS] == ["torch"] * len(OPS)
