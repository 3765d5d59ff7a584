"""Cross-entropy against torch's own."""

import torch
from torch.nn import functional

from segray.losses import compute_cross_entropy

IGNORE = 255


def test_mean_and_gradient_equal_torchs() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 7, requires_grad=True)
    truth = torch.randint(0, 3, (2, 5, 7))
    truth[0, :2] = IGNORE
    loss = compute_cross_entropy(logits, truth, IGNORE)
    expected = functional.cross_entropy(logits, truth, ignore_index=IGNORE)
    torch.testing.assert_close(loss.total / loss.num_scored_px, expected)
    (got,) = torch.autograd.grad(loss.total / loss.num_scored_px, logits)
    torch.testing.assert_close(got, torch.autograd.grad(expected, logits)[0])


def test_a_batch_that_is_all_ignored_adds_nothing() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = compute_cross_entropy(logits, torch.full((1, 4, 4), IGNORE), IGNORE)
    assert loss.total.item() == 0
    assert loss.num_scored_px.item() == 0
    assert not torch.autograd.grad(loss.total, logits)[0].any()


def test_logits_in_half_precision_are_summed_in_single() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 64, 64).bfloat16()
    truth = torch.randint(0, 3, (2, 64, 64))
    loss = compute_cross_entropy(logits, truth, IGNORE)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, functional.cross_entropy(logits.float(), truth, reduction="sum"))
