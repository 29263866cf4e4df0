"""Every kernel touches the least bytes that it could, and no more than the best of the peers asks for."""

import pytest

pytest.importorskip("triton")
from benchmarks import kernel_bytes  # noqa: E402

SMALL = {
    "attention": lambda: kernel_bytes.attend("sm_90", "", [200, 65, 1, 63], [-1, 0, 0, -1], 4, 2, 64),
    "decode": lambda: kernel_bytes.decode("sm_90", prompt=256, answer=64, group=3, H=4, K=2),
    "token_logprob": lambda: kernel_bytes.token_logprob("sm_90", T=300, V=2500, D=128),
    "logits_logprob": lambda: kernel_bytes.logits_logprob("sm_90", T=6, live=4, V=9000),
    "grpo_loss": lambda: kernel_bytes.grpo_loss("sm_90", T=3000),
}


@pytest.mark.parametrize("name", SMALL)
def test_touched_is_least(name):
    """Within one part in a hundred, and what else is touched is named as workspace."""
    rows = [row for row in SMALL[name]() if row["whose"] == "minitrl"]
    assert rows
    for row in rows:
        assert 0.99 <= row["touched"] / row["least"] <= 1.01, row


@pytest.mark.slow
def test_a_shared_prefix_saves_bytes_and_products():
    """8 answers of 256 tokens to a prompt of 1,024: K and V by 3.3 times at least, FLOPs by 2.2."""
    rows = kernel_bytes.shared_prefix("sm_90", H=1)
    half = len(rows) // 2
    for shared, repeated in zip(rows[:half], rows[half:]):
        assert shared["kernel"] == repeated["kernel"]
        assert repeated["kv"] >= 3.3 * shared["kv"], (shared, repeated)
        assert repeated["flops"] >= 2.2 * shared["flops"], (shared, repeated)
