"""The counted cost of a step on a GPU is plausible, and within the bounds that were reached."""

import pytest
import torch

from support import selection
from tools import bench, cost

GPU = cost.Device()
WEIGHTS = 84_934_656  # of BERT-base's encoder
LARGE, SMALL = bench.COST_SIZES  # 64 x 128 and 32 x 40 tokens
# The ratio to a dense step, 5% above what was reached. In the small batch masks weigh most.
BOUNDS = [
    ("smp-s", LARGE, 1.152),
    ("smp-s", SMALL, 1.565),
    ("smp-l", SMALL, 1.473),
    ("movement", SMALL, 1.676),
    ("pins", SMALL, 1.304),
]


def bill_of(method, size):
    """The bill of one step. Of PINS it is a step that does not rank the weights."""
    return bench.bill_of_step(method, "base", "bf16", *size, steps=1)


@pytest.fixture(scope="module")
def dense():
    """{size: bill of a dense step}."""
    return {size: bill_of("dense", size) for size in bench.COST_SIZES}


@pytest.mark.parametrize("method, size, bound", BOUNDS)
def test_bounds(method, size, bound, dense):
    bill = bill_of(method, size)
    assert bill.weights == WEIGHTS
    assert bill.seconds(GPU) < bound * dense[size].seconds(GPU)
    if (method, size) == ("smp-s", LARGE):
        kernels, moved, _ = bill.total()
        assert (moved - dense[size].total()[1]) / WEIGHTS < 42.2
        assert kernels - dense[size].total()[0] < 251


def work_of_a_step(config, size, length):
    """The floating-point operations of the linear layers in a dense step, without attention."""
    width = config.hidden_size
    # Of the last layer only position 0 is computed, but for its keys and values.
    not_computed = 2 * width * (width + config.intermediate_size) * (1 - 1 / length)
    return 6 * (bench.weights_of_encoder(config) - not_computed) * size * length


def test_a_dense_step(dense):
    """The products are 6 FLOPs for each weight and token, but for the last layer's position 0."""
    _, moved, flops = dense[LARGE].total()
    expected = work_of_a_step(bench.BertConfig(), *LARGE)
    attention = 7 * 2 * (11 * 64 * 128 * 128 * 768 + 64 * 128 * 768)  # of 11 layers and a position
    assert abs(flops / (expected + attention) - 1) < 0.001
    assert moved > 28 * WEIGHTS  # AdamW alone
    assert all(item.bytes > 0 and item.kernels > 0 for item in dense[LARGE].select())
    parts = sum(dense[LARGE].seconds(GPU, part) for part in cost.PARTS)
    assert abs(parts - dense[LARGE].seconds(GPU)) < 1e-12


def bytes_of(function, *tensors):
    """The bytes for each value of the first tensor that a function of `tensors` moves."""
    with cost.as_on_cuda(torch.bfloat16, steps=1) as counter:
        counter.mark("masks")
        function(*tensors)
    return counter.bill.total()[1] / tensors[0].numel()


def test_selection_by_a_full_sort_exceeds_the_bound():
    """To sort all scores moves more bytes for each than the whole of SMP-S may cost."""
    scores = torch.empty(12, 3072, 768, device="meta")
    k = torch.empty(12, 1, dtype=torch.long, device="meta")
    assert bytes_of(selection.select_on_device, scores, k) < 43
    assert bytes_of(selection.select_by_sort, scores, k) > 150


def test_the_price_of_simple_operations():
    """A sum reads two tensors and writes one. A view is free. What is expanded is read once."""
    x, y = torch.empty(2, 1000, 64, device="meta")
    assert bytes_of(torch.add, x, y) == 12
    assert bytes_of(torch.Tensor.add_, x, y) == 12
    assert bytes_of(torch.Tensor.copy_, x, y) == 8
    assert bytes_of(torch.mul, x, x) == 8
    assert bytes_of(lambda x: x.t()[:, None], x) == 0
    assert bytes_of(lambda x, row: x + row.expand(1000, -1), x, y[:1]) == 8 + 4 / 1000
