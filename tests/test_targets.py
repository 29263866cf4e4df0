"""The switch between Triton and plain PyTorch, the choice of a target, and the shape of the table of tiles."""

import pytest
import torch

from minitrl.kernels import targets

CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def gpu_tensor(monkeypatch):
    """A tensor that says it is on a GPU, where there is none; and no variable set."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.delenv("MINITRL_KERNELS", raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.empty(1, device="cuda")


def test_unset_goes_by_the_device(gpu_tensor):
    assert targets.use_triton(gpu_tensor)
    assert not targets.use_triton(CPU)


def test_reference_wins_everywhere(gpu_tensor, monkeypatch):
    monkeypatch.setenv("MINITRL_KERNELS", "reference")
    monkeypatch.setattr(targets, "interpreted_as", "sm_90")
    assert not targets.use_triton(gpu_tensor) and not targets.use_triton(CPU)


def test_triton_on_the_cpu_is_an_error_but_under_the_interpreter(gpu_tensor, monkeypatch):
    monkeypatch.setenv("MINITRL_KERNELS", "triton")
    assert targets.use_triton(gpu_tensor)
    with pytest.raises(ValueError, match="on cpu: move it to a GPU"):
        targets.use_triton(CPU)
    monkeypatch.setattr(targets, "interpreted_as", "sm_90")
    assert targets.use_triton(CPU)


@pytest.mark.parametrize("wanted", ["", "triton"])
def test_missing_triton_is_an_error(wanted, gpu_tensor, monkeypatch):
    monkeypatch.setenv("MINITRL_KERNELS", wanted)
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton, or set MINITRL_KERNELS=reference"):
        targets.use_triton(gpu_tensor)


def test_a_misspelt_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("MINITRL_KERNELS", "Triton")
    with pytest.raises(ValueError, match="MINITRL_KERNELS='Triton': set it to triton or reference"):
        targets.use_triton(CPU)


@pytest.mark.parametrize(
    "architecture, target",
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
        ((10, 3), "sm_100"), ((12, 0), "sm_100"), ("gfx942:sramecc+:xnack-", "gfx942"),
    ],
)  # fmt: skip
def test_a_device_takes_the_nearest_target(architecture, target):
    assert targets.target_of(architecture) == target


@pytest.mark.parametrize("architecture, name", [((7, 5), "sm_75"), ("gfx90a:sramecc+", "gfx90a")])
def test_a_device_without_a_target_is_an_error(architecture, name):
    with pytest.raises(ValueError, match=f"not on {name}: set MINITRL_KERNELS=reference"):
        targets.target_of(architecture)


def test_config_is_the_current_targets(monkeypatch):
    monkeypatch.setattr(
        targets, "CONFIGS", {"op": {target: {"num_warps": i} for i, target in enumerate(targets.TARGETS)}}
    )
    for i, target in enumerate(targets.TARGETS):
        monkeypatch.setattr(targets, "interpreted_as", target)
        assert targets.config("op") == {"num_warps": i}


def test_every_kernel_has_a_row_for_every_target():
    for name, rows in targets.CONFIGS.items():
        assert tuple(rows) == targets.TARGETS, name
        for target, row in rows.items():
            assert row["num_warps"] in (1, 2, 4, 8, 16) and row["num_stages"] >= 1, (name, target)
            tiles = [value for key, value in row.items() if key.isupper() and not isinstance(value, bool)]
            assert all(value & (value - 1) == 0 for value in tiles), f"{name}, {target}: a tile is no power of two"


@pytest.mark.parametrize("stand_in, used", [(None, False), ("sm_90", True)])
def test_the_switch_goes_through_torch_compile(stand_in, used, monkeypatch):
    """An op that asks it compiles into one graph, whose other inputs no longer ask."""
    monkeypatch.setattr(targets, "interpreted_as", stand_in)
    torch._dynamo.reset()
    answer = torch.compile(lambda x: x + targets.use_triton(x), fullgraph=True, backend="eager")
    assert answer(CPU) == used
