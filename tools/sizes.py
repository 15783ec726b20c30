"""The tables of densities and sizes that `python eval.py RUN` prints."""

import math

import numpy as np

from prune import encoder_matrices


def entropy(density):
    """Return the bits per weight that a random mask of this density needs on average."""
    return sum(p * math.log2(1 / p) for p in (density, 1 - density) if p)


def kept_weights(model):
    """Return (non-zero weights, all weights) of the encoder's matrices: two arrays (L, 6)."""
    matrices = encoder_matrices(model).values()
    kept = [[int(linear.weight.count_nonzero()) for linear in peers] for peers in matrices]
    sizes = [[linear.weight.numel() for linear in peers] for peers in matrices]
    return np.array(kept).T, np.array(sizes).T  # (6, L) -> (L, 6)


def print_densities(kept, sizes, letters):
    """Print a row per layer and a row for all; a column per matrix and a column for all."""
    print("density (non-zero weights over all, as saved)")
    print("  layer " + "".join(f"{letter:>8}" for letter in [*letters, "all"]))
    densities = with_totals(kept) / with_totals(sizes)  # (L + 1, 7)
    for name, row in zip([*range(len(kept)), "all"], densities):
        print(f"  {name:>5} " + "".join(f"{density:8.4f}" for density in row))


def with_totals(table):
    """Return a table (L, 6) with a row and a column of sums, (L + 1, 7)."""
    table = np.vstack([table, table.sum(0)])
    return np.column_stack([table, table.sum(1)])


def print_sizes(model, kept, total):
    """Print the megabytes of a model, of its matrices, of what is kept, and of the mask.

    `kept` of the `total` weights of its matrices are not 0.
    """
    everything = sum(p.numel() for p in model.parameters())
    print("size")
    mask_mb = total / 8e6  # a bit per weight
    print(f"  all parameters   {everything:12,}  {4 * everything / 1e6:8.2f} MB in fp32")
    print(f"  encoder matrices {total:12,}  {4 * total / 1e6:8.2f} MB in fp32, zeros stored")
    print(f"  kept of these    {kept:12,}  {2 * kept / 1e6:8.2f} MB in fp16, without their places")
    shortest = f"{mask_mb * entropy(kept / total):.2f} MB at its entropy"
    print(f"  the mask alone                 {mask_mb:8.2f} MB as bits, {shortest}")
