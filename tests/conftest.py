"""Settings for all tests."""

import os

import torch


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
