"""A few cases of each kind of the fuzzer of files (fuzz.py), with a fixed seed."""

import pytest

from tests.faults.fuzz import KINDS, fuzz


@pytest.mark.parametrize("name", KINDS)
def test_files_that_are_damaged_or_forged_survive(name, tmp_path):
    failures = fuzz(name, 40, 1, tmp_path)
    assert not failures, "\n".join(failures)
