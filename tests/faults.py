"""Faults planted on purpose: a module with one piece of its source replaced. Tests that miss them prove nothing."""

import linecache
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch


def mutant(module: ModuleType, right: str, wrong: str) -> ModuleType:
    """A copy of the module that says `wrong` where it says `right`, which must stand there exactly once."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{module.__file__} is written otherwise now, rewrite this fault: {right!r}"
    made = ModuleType(f"{module.__name__}_with_a_fault")
    made.__package__, made.__file__ = module.__package__, module.__file__
    sys.modules[made.__name__] = made  # dataclasses look their module up by name
    faulty = source.replace(right, wrong)
    # Triton reads a kernel's source where its file name says that it stands.
    linecache.cache[made.__name__] = len(faulty), None, faulty.splitlines(keepends=True), made.__name__
    exec(compile(faulty, made.__name__, "exec"), vars(made))
    return made


def plant(monkeypatch, module: ModuleType, right: str, wrong: str) -> None:
    """Put the fault into the module itself, until the test ends. Its operators stay as registered, but what they call
    is faulty."""
    with mock.patch.object(torch.library, "custom_op"):  # a second registration would replace the first for good
        faulty = mutant(module, right, wrong)
    for name, value in list(vars(faulty).items()):
        if isinstance(value, mock.NonCallableMock):
            setattr(faulty, name, getattr(module, name))
        elif getattr(value, "__module__", "") == faulty.__name__:
            monkeypatch.setattr(module, name, value)
