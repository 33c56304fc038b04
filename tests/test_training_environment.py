"""environment.json, and what a resumed run reads of it."""

import json

import pytest
import torch

from longfire.ops import bf16
from longfire.training import environment
from longfire.training.environment import ENVIRONMENT, multiplies_bf16, write_environment

CPU = torch.device("cpu")


@pytest.mark.parametrize("answer", [True, False])
def test_a_resumed_run_keeps_the_answer_of_its_first_start(answer, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "may_have_units", lambda: True)
    with bf16.assumed(answer):
        write_environment(tmp_path, 0)
    with bf16.assumed(not answer):
        assert multiplies_bf16(tmp_path, CPU) == answer


def test_another_cpu_answers_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "may_have_units", lambda: True)
    with bf16.assumed(True):
        write_environment(tmp_path, 0)
    file = tmp_path / ENVIRONMENT
    file.write_text(json.dumps({**json.loads(file.read_text()), "cpu": "another"}))
    with bf16.assumed(False):
        assert not multiplies_bf16(tmp_path, CPU)


def test_a_cpu_without_units_and_a_run_without_a_file_are_measured(tmp_path, monkeypatch):
    with bf16.assumed(False):
        assert not multiplies_bf16(tmp_path, CPU)
    with bf16.assumed(True):
        write_environment(tmp_path, 0)
    monkeypatch.setattr(environment, "may_have_units", lambda: False)
    with bf16.assumed(False):
        assert not multiplies_bf16(tmp_path, CPU)
