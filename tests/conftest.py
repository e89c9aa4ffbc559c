"""Fixtures that several subjects share."""

import pytest
import torch

from tersor import _C


@pytest.fixture(params=_C.isas())
def isa(request):
    """Each instruction set that can run here, in turn."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def _one_thread():
    """Small tensors: a second thread costs more than it gives, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


one_thread = pytest.fixture(_one_thread, name="one_thread")
one_thread_throughout = pytest.fixture(_one_thread, scope="module", name="one_thread_throughout")  # fixtures as well


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a CUDA device, and is skipped where there is none")


def pytest_collection_modifyitems(items):
    for item in items:
        if any("CUDA device" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")
