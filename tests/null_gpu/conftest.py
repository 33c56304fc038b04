"""Checks under the stand-in (tests/null_gpu/README.md): collected where it is loaded, and nowhere
else."""

import counts
import pytest

collect_ignore_glob = [] if counts.is_loaded() else ["test_*.py"]


@pytest.fixture(autouse=True)
def what_the_stand_in_lacks():
    """cuDNN and numbers: see kernels.py."""
    import kernels

    with kernels.without_numbers() as started:
        yield started
