"""device.py: the choice of device and type is logged as it is; the clock's parts add up."""

import time

import pytest
import torch

from longfire.config.settings import Model, Training
from longfire.device import Clock, choose_device, choose_dtype, matmul_peak, peak_memory_bytes
from longfire.errors import SettingsError

pytestmark = pytest.mark.dtype

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with CUDA does not refuse it")
def test_cuda_where_there_is_none_is_an_error_with_the_mend():
    with pytest.raises(SettingsError, match="training.device = 'cuda'.*auto or cpu"):
        choose_device(Training(device="cuda"))


def test_an_asked_type_wins_over_what_the_device_likes():
    dtype, message = choose_dtype(Model(compute_dtype="bfloat16"), CPU)
    assert dtype == torch.bfloat16 and "asked for by model.compute_dtype" in message


def test_the_clock_splits_a_step_and_starts_anew():
    clock = Clock(CPU)
    with clock("forward"):
        time.sleep(0.02)
    parts = clock.read()
    assert parts["forward"] >= 0.02
    assert parts["seconds"] == pytest.approx(parts["forward"] + parts["other"])
    assert "forward" not in clock.read()


def test_peak_and_memory_are_of_this_machine():
    peak, source = matmul_peak(CPU, torch.float32)
    assert peak > 1e8 and "measured" in source
    assert peak_memory_bytes(CPU) > 50e6
