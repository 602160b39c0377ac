"""No test of recording leaves a torch function mode active."""

import pytest
import torch
import torch.utils.checkpoint
from torch.overrides import _len_torch_function_stack


@pytest.fixture(autouse=True)
def _no_function_mode_survives_a_test():
    """Also ends those that do, so that one failure stays one."""
    yield
    left = _len_torch_function_stack()
    for _ in range(left):
        torch._C._pop_torch_function_stack()
    assert left == 0
