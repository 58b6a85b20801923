"""Settings for all tests."""

import os

import pytest
import torch


def pytest_configure() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that no worker has one left at the end."""
    slow = [item.path for item in items if item.get_closest_marker("slow")]
    items.sort(key=lambda item: -slow.count(item.path))
