import torch
from hypothesis import HealthCheck, settings

settings.register_profile("natgrad", deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("natgrad")


def pytest_runtest_setup(item):
    torch.manual_seed(0)
