"""Faults planted on purpose: a module with one piece of its source replaced. Tests that miss them prove nothing."""

import sys
from pathlib import Path
from types import ModuleType


def mutant(module: ModuleType, right: str, wrong: str) -> ModuleType:
    """A copy of the module that says `wrong` where it says `right`, which must stand there exactly once."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{module.__file__} is written otherwise now, rewrite this fault: {right!r}"
    made = ModuleType(f"{module.__name__}_with_a_fault")
    made.__package__, made.__file__ = module.__package__, module.__file__
    sys.modules[made.__name__] = made  # dataclasses look their module up by name
    exec(compile(source.replace(right, wrong), made.__name__, "exec"), vars(made))
    return made
