"""support/selection.py chooses the largest values exactly, on a CPU and in the way of a GPU."""

import numpy as np
import pytest
import torch

from support import matrices, selection


def stable_top_k(values, k):
    """The mask of the k largest by a stable sort of all: among equals the first stay."""
    flat = values.flatten()
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[flat.sort(descending=True, stable=True).indices[:k]] = True
    return mask.view(values.shape)


def fill(rng, kind, shape):
    """Values of one of six kinds."""
    values = rng.normal(size=shape).astype(np.float32)
    if kind == 1:
        values = np.round(values)  # many ties, and zeros of both signs
    elif kind == 2:
        values = np.full(shape, values.flat[0])  # all equal
    elif kind == 3:
        values = np.where(values > 0.5, np.float32(0.02), np.float32(-0.02))  # two values only
    elif kind == 4:
        exponents = rng.integers(0, 2, size=shape)
        values = values * np.float32(1e-30) ** exponents  # many scales, denormals
    elif kind == 5:
        values = np.sort(values, axis=None).reshape(shape)
    return torch.from_numpy(values.astype(np.float32))


def test_the_cpu_way_is_exact():
    """The mask keeps exactly the k values that a stable descending sort puts first."""
    rng = np.random.default_rng(0)
    for i in range(200):
        shape = (int(rng.integers(1, 70)), int(rng.integers(1, 70)))
        values = fill(rng, i % 6, shape)
        k = int(rng.integers(0, values.numel() + 1))
        assert torch.equal(selection.top_k_mask(values, k), stable_top_k(values, k))
        if k:
            threshold = values.flatten().sort(descending=True).values[k - 1]
            assert selection.kth_largest(values.flatten().numpy(), k) == threshold


def counts_of(rng, matrices, n):
    """A k for each of some matrices of n values: often one of the corners."""
    choices = [0, 1, n - 1, n, n // 10, int(rng.integers(0, n + 1))]
    return torch.tensor([int(rng.choice(choices)) for _ in range(matrices)])


def test_the_device_way_is_exact():
    """500 times: up to three matrices at once, each with its own k, under every kind of ties."""
    rng = np.random.default_rng(0)
    for i in range(500):
        matrices, rows = int(rng.integers(1, 4)), int(rng.integers(1, 120))
        width = selection.STRIDE * int(rng.integers(1, 5))
        values = fill(rng, i % 6, (matrices, rows, width))
        counts = counts_of(rng, matrices, rows * width)
        masks, wrong = selection.select_on_device(values, counts[:, None])
        assert not wrong
        for matrix, k, mask in zip(values, counts, masks):
            assert torch.equal(mask, stable_top_k(matrix, int(k)))


def test_the_device_way_is_exact_where_little_lies_between():
    """A matrix of BERT's size: few of its values are sorted, and the mask is the CPU's."""
    rng = np.random.default_rng(0)
    n = 768 * 768
    assert selection.room(n) < n / 10
    for kind in range(6):
        values = fill(rng, kind, (2, 768, 768))
        counts = torch.tensor([n // 10, n // 2])
        masks, wrong = selection.select_on_device(values, counts[:, None])
        assert not wrong
        for matrix, k, mask in zip(values, counts, masks):
            assert torch.equal(mask, selection.top_k_mask(matrix, int(k)))


@pytest.mark.parametrize("small", [0, 1 << 30])
def test_one_function_for_all_devices(small, monkeypatch):
    """The code for a GPU, run here on the CPU, makes the masks of the CPU's code."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(selection, "SMALL", small)  # select by cuts, or by a sort
    for shape in ((2, 40, 64), (3, 7, 5), (2, 12)):  # the last two are always sorted
        values = fill(rng, 1, shape)
        counts = torch.linspace(1, values[0].numel(), len(values), dtype=torch.float64) + 0.5
        expected, nothing = selection.top_k_masks(values, counts)
        assert nothing is False
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
            masks, wrong = selection.top_k_masks(values, counts)
        assert not wrong
        for ours, theirs in zip(masks, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_wrong_mask_is_reported(monkeypatch):
    """With cuts that are far too narrow many masks are wrong, and each of these is reported."""
    rng = np.random.default_rng(2)
    monkeypatch.setattr(selection, "CERTAINTY", 0.01)
    reported = 0
    for _ in range(50):
        values = fill(rng, 0, (1, 128, 128))
        masks, wrong = selection.select_on_device(values, torch.tensor([[5000]]))
        reported += int(wrong)
        assert wrong or torch.equal(masks[0], stable_top_k(values[0], 5000))
    assert reported > 10


def test_infinities_are_rejected():
    for wrong in (float("nan"), float("inf"), -float("inf")):
        scores = torch.randn(30, 20)
        scores[7, 3] = wrong
        with pytest.raises(ValueError, match="NaN or infinity among the values"):
            selection.top_k_mask(scores, 60)


def test_plateaus():
    """Most scores are equal, as |W| is where most weights are zero."""
    plateau = torch.zeros(300, 200)
    plateau[0, :7] = torch.arange(1, 8)
    for k in (1, 6, 7, 8, 30_000, 59_999):
        assert torch.equal(selection.top_k_mask(plateau, k), stable_top_k(plateau, k))


def test_an_adversarial_order():
    """`kth_largest` stays exact where its sample, every 61st value, says little about the rest.

    The arrays are sorted, have a period of 61, or have a spike at every 61st place.
    """
    n = 200_000
    ramp = np.arange(n, dtype=np.float32)
    spiked = np.zeros(n, np.float32)
    spiked[1::61] = 1.0  # the sample sees no spike; rolled by one, it sees only spikes
    for values in (ramp, -ramp, ramp % 61, spiked, np.roll(spiked, -1)):
        ordered = np.sort(values)[::-1]
        for k in (1, 2, 1000, n // 2, n - 1, n):
            assert selection.kth_largest(values, k) == ordered[k - 1]


def test_matrices_side_by_side_are_not_copied():
    """`as_one` gives the tensor that they are parts of, and else a copy of them in their order."""
    whole = torch.randn(4, 3, 5)
    parts = list(whole)
    assert matrices.as_one(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(matrices.as_one(parts[1:3]), whole[1:3])
    for others in (parts[::-1], [parts[0], parts[2]], [parts[0], parts[1].clone()]):
        together = matrices.as_one(others)
        assert torch.equal(together, torch.stack(others))
        assert together.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
