from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.overrides import _len_torch_function_stack

from natgrad.capture.eager import EAGER
from pairwise import mark_all_but_some, mark_the_rest

settings.register_profile("natgrad", deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("natgrad")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Test processes with more threads than cores keep one another waiting."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_mode_survives_a_test():
    """No function mode, and no order to run compiled code eagerly. It also ends those that do, so that one failure
    stays one."""
    before = _len_torch_function_stack()
    yield
    left = _len_torch_function_stack() - before
    for _ in range(left):
        torch._C._pop_torch_function_stack()
    eager = EAGER._within
    while EAGER._within:
        EAGER.__exit__()
    assert left == 0
    assert not eager


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("keyword"):  # whoever asks for a row by its name means it
        return
    mark_the_rest(items, pytest.mark.long)
    mark_all_but_some(items, pytest.mark.long, Path(__file__).parent)


def pytest_runtest_setup(item):
    torch.manual_seed(0)
