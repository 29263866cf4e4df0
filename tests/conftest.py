"""Markers, and which tests a plain `python -m pytest` runs: all but the slow ones. `--full` runs them too."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    torch.set_num_threads(1)  # for tensors this small a second thread costs more than it brings: far more on busy cores
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random checkpoint, data and rewards for whole runs (miniature.py)."""
    import miniature  # it imports all of minitrl, which not every test needs

    return miniature.make(tmp_path_factory.mktemp("tiny"))
