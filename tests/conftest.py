"""Markers, and which tests a plain `python -m pytest` runs: all but the slow ones. `--full` runs them too."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than about 20 seconds; runs with --full, or with -m slow")
    config.addinivalue_line("markers", "parity: compares with transformers or TRL; needs pip install -e '.[parity]'")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full") or config.option.markexpr:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: add --full"))


@pytest.fixture
def poisoned_memory():
    """Fills what torch.empty gives with NaN: a kernel that forgets to write a number cannot pass by luck."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
