"""Settings for all tests."""

import os

import torch


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores
        torch.set_num_threads(1)
