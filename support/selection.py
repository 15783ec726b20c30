"""Which of many values are the largest, exactly, without sorting them all.

`top_k_masks` is the mask function of every method. Among equal values those that come first in
row-major order are kept, on every device.

On a CPU a matrix at a time is searched in the way of Floyd and Rivest (1975). On a GPU nothing may
be read back, because the host would wait. `select_on_device` does not need to: the sizes of all its
tensors are known in advance.
"""

import math

import numpy as np
import torch

STRIDE = 32  # the sample has one value of each so many; by count 16 moves 5% less, 64 20% more
CERTAINTY = 40.0  # a bound that holds but for a probability of exp(-CERTAINTY), 4e-18
SMALL = 1 << 16  # matrices of fewer values are sorted


def top_k_masks(values, counts):
    """Return for B tensors of one shape, (B, ...), the bool masks of their counts[l] largest.

    `counts` is a tensor (B), on the same device as `values`; it is rounded down, and exactly so
    many are kept. The second result says whether a mask may be wrong: False, or a bool tensor; see
    `select_on_device`. Raises ValueError for NaN and infinity, but only on a CPU.
    """
    if values.is_cpu:
        return [top_k_mask(v, int(k)) for v, k in zip(values, counts)], False
    k = counts.long()[:, None]  # (B, 1)
    small = values[0].numel() < SMALL
    if small or values.dim() != 3 or values.size(2) % STRIDE or values.is_mps:
        return select_by_sort(values, k), False
    return select_on_device(values, k)


def select_by_sort(values, k):
    """Return the masks (B, ...) of the k (B, 1) largest."""
    flat = values.flatten(1)  # (B, n)
    order = flat.sort(dim=1, descending=True, stable=True).indices
    kept = torch.arange(flat.size(1), device=flat.device) < k  # (B, n), the largest first
    return torch.empty_like(kept).scatter_(1, order, kept).view_as(values)


# ---------- on a CPU ------------------------------------------------------------------------------


def top_k_mask(values, k):
    """Return the bool mask of the k largest of a tensor on the CPU."""
    if k in (0, values.numel()):
        return torch.full_like(values, k > 0, dtype=torch.bool)
    flat = values.detach().numpy().reshape(-1)  # (out, in) -> (numel,)
    if not math.isfinite(flat.sum()):
        raise ValueError("NaN or infinity among the values: no order tells which are the largest")
    threshold = kth_largest(flat, k)
    mask = flat >= threshold
    surplus = np.count_nonzero(mask) - k
    if surplus:
        mask[np.flatnonzero(flat == threshold)[-surplus:]] = False
    return torch.from_numpy(mask).view(values.shape)


def kth_largest(values, k):
    """Return the k-th largest value (1 <= k <= n) of a flat float32 array, exactly.

    A sample brackets the value; only what lies inside is partitioned.
    """
    n = values.size
    sample = np.sort(values[::61])  # a prime, because the columns of a matrix may repeat
    rank = (1 - k / n) * sample.size  # where the value should lie in the sample
    spread = 2 + 3 * math.sqrt(sample.size * k / n * (1 - k / n))  # three standard deviations
    low_rank = math.floor(rank - spread)
    high_rank = math.ceil(rank + spread)
    low = sample[low_rank] if low_rank >= 0 else -np.inf
    high = sample[high_rank] if high_rank < sample.size else np.inf

    # The value is inside if and only if `above` has fewer than k and with `inside` at least k.
    above = values >= high
    inside = values[(values > low) & ~above]
    place = np.count_nonzero(above) + inside.size - k  # in ascending order
    if 0 <= place < inside.size:
        return np.partition(inside, place)[place]
    if np.count_nonzero(values > low) < k <= np.count_nonzero(values >= low):
        return low  # many values are equal
    return np.partition(values, n - k)[n - k]  # the sample misled


# ---------- on a device ---------------------------------------------------------------------------
#
# The values of a matrix are in one order, without ties: the larger value first, and among equals
# the one that comes first. A *cut* (v, b) is a place in that order, between two values. Before it
# are the values above v, and those equal to v in the first b rows of the matrix. So a cut is one
# comparison per value: with v in the first b rows, and with the next float above v in the others.
#
# 1. A sample, sorted, gives two cuts for each matrix. Fewer than k values are before the first cut,
#    and at least k before the second: k lies between.
# 2. What is before the first cut stays. What is not before the second one goes.
# 3. What lies between is copied to a small table, and sorted. The first of it stay, as many as are
#    still missing.
#
# Why this does not fail. The sample has one value of each STRIDE neighbours, at a random place that
# does not depend on the values. So the number X of sampled values among the first r in the order is
# a sum of independent draws with mean r / STRIDE, and Bernstein's inequality says
#     P(|X - r / STRIDE| >= margin(r / STRIDE)) <= 2 exp(-CERTAINTY)
# for ALL values, whatever their distribution and their ties. This bounds where the cuts lie and, by
# the same inequality for each of the n stretches of `size` values, how many lie between. With
# BERT-base's 72 matrices all of it holds but for one step in 1e9. If it does not hold, the function
# says so.


def select_on_device(values, k):
    """Return the masks (B, rows, width) of the k (B, 1) largest, and whether they may be wrong.

    The second result is a bool tensor without dimensions. `width` is a multiple of STRIDE. The
    sample is another one in every call, and the masks do not depend on it.
    """
    matrices, rows, width = values.shape
    n = rows * width
    count = n // STRIDE  # values in the sample of a matrix
    generator = torch.Generator(values.device)
    generator.seed()
    places = torch.randint(STRIDE, (count,), generator=generator, device=values.device)
    places = places[None, :, None].expand(matrices, -1, -1)
    sample = values.view(matrices, count, STRIDE).gather(2, places)[..., 0]  # (B, count)
    ranked, order = sample.sort(dim=1, descending=True, stable=True)

    # the two cuts, (B, 2): the last sampled value surely among the k largest, the first surely not
    rank = k.double() / STRIDE
    spread = margin(rank * (1 - k / n))
    sides = torch.linspace(-1, 1, 2, device=values.device)
    ends = (rank + (spread + 1) * sides).floor().long()
    nearest = ends.clamp(0, count - 1)
    cut = ranked.gather(1, nearest)
    cut = cut.masked_fill(ends < 0, math.inf).masked_fill(ends >= count, -math.inf)
    row = order.gather(1, nearest) // (width // STRIDE) + (sides > 0)
    first_rows = torch.arange(rows, device=values.device) < row[..., None]  # (B, 2, rows)
    above = torch.nextafter(cut, torch.full_like(cut, math.inf))
    cuts = torch.where(first_rows, cut[..., None], above[..., None])[..., None]  # (B, 2, rows, 1)

    masks = values >= cuts[:, 1]  # before the second cut: k values at least
    between = values >= cuts[:, 0]  # before the first cut: fewer than k
    missing = k - between.sum((1, 2))[:, None]  # (B, 1)
    between ^= masks

    # what lies between the cuts, as a table (B, size)
    size = min(room(n) + 2 * width, n + 1)
    flat = between.view(-1)
    found = torch.nonzero_static(flat, size=matrices * size, fill_value=len(flat))[:, 0]
    firsts = torch.arange(matrices + 1, device=values.device) * n
    starts = torch.searchsorted(found, firsts)  # (B + 1,) where each matrix begins in `found`
    columns = torch.arange(size, device=values.device)
    column = starts[:-1, None] + columns  # (B, size)
    real = column < starts[1:, None]  # the others fill up the table
    column = column.clamp(max=min(len(found), len(flat)) - 1)
    found = torch.where(real, found[column], column)
    table = torch.where(real, values.view(-1)[found], -math.inf)
    order = table.sort(dim=1, descending=True, stable=True).indices

    # 1 is taken from the mask of what does not stay, and 0 from that of what does
    held = starts.diff()[:, None]  # (B, 1) values between the cuts
    goes = (columns >= missing) & (columns < held)  # (B, size)
    places = found.gather(1, order).view(-1)
    goes = goes.view(torch.int8).view(-1)
    masks.view(torch.int8).view(-1).index_add_(0, places, goes, alpha=-1)

    wrong = (missing < 0) | (missing > held) | (held >= size)
    return masks, wrong.any()


def margin(variance):
    """Return how far a sum of independent draws of that variance may be from its mean."""
    return CERTAINTY / 3 + (CERTAINTY**2 / 9 + 2 * CERTAINTY * variance) ** 0.5


def room(n):
    """Return how many of n values may lie between the cuts: see the proof above."""
    between = 2 * margin(n / STRIDE / 4) + 4  # sampled values, at most
    sampled = between
    for _ in range(20):  # to where `sampled`, less its own margin, is `between`
        sampled = between + margin(sampled)
    return math.ceil(sampled) * STRIDE
