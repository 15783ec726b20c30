"""Patterns: weights that are kept or dropped as one block.

weight    single weights: no pattern
n:m       of every m neighbours in a row the n largest stay
bxb       square blocks of b rows and b columns
unit      a unit of the feed-forward part: its row of every matrix, and its column of the last one
head      an attention head in the same way, and units as well

A model says which letters belong together: `attention_letters` and `feed_forward_letters`.
"""

import math
import re

import torch

from support.matrices import widest
from support.selection import top_k_masks
from support.terminal import UserError

TIED = ("unit", "head")


def n_of_m(pattern):
    """Return (n, m) of the pattern "n:m", and (0, 1) of any other."""
    n, _, m = pattern.partition(":")
    return (int(n), int(m)) if m else (0, 1)


def side_of(pattern):
    """Return b of the pattern "bxb", and 0 of any other."""
    found = re.fullmatch(r"(\d{1,2})x\1", pattern)
    return int(found[1]) if found else 0


def check_pattern(pattern, density):
    """Return the density of a pattern; UserError if there is no such pattern, or it has another."""
    if pattern in ("weight", *TIED) or side_of(pattern) > 1:
        return density
    n, m = n_of_m(pattern) if re.fullmatch(r"\d{1,2}:\d{1,2}", pattern) else (0, 0)
    if not 0 < n < m:
        names = f"weight, {', '.join(TIED)}, square blocks as 8x8"
        expected = f"expected {names}, or n:m with 0 < n < m, as 2:4"
        raise UserError(f"--pattern {pattern}: {expected}")
    if density not in (None, n / m):
        raise UserError(f"--density {density}: --pattern {pattern} keeps {n / m:g}")
    return n / m


def tied_letters(model, pattern):
    """Return the groups of letters that a pattern ties in a layer of the model."""
    if pattern == "head":
        return [model.attention_letters, model.feed_forward_letters]
    return [model.feed_forward_letters] if pattern == "unit" else []


def blocks_in(method, letters):
    """Return the number of blocks that tied letters have in a layer: heads, or units."""
    if letters == method.model.attention_letters:
        return method.model.num_heads
    return method.masked[letters[0]][0].out_features


def check_density(method):
    """Raise ValueError if the density keeps no weight of a matrix, or no block of a pattern.

    So it does if a matrix cannot be cut into the square blocks of a pattern.
    """
    density = method.settings.density
    sizes = {"weights": min(linear.weight.numel() for linear in method.linears)}
    side = side_of(method.settings.pattern)
    if side:
        sizes["blocks"] = sizes["weights"] // side**2
        for out, wide in sorted({linear.weight.shape for linear in method.linears}):
            if out % side or wide % side:
                raise ValueError(f"--pattern {side}x{side}: a matrix is {out} x {wide}")
    for letters in tied_letters(method.model, method.settings.pattern):
        heads = letters == method.model.attention_letters
        sizes["attention heads" if heads else "units"] = blocks_in(method, letters)
    for name, size in sizes.items():
        if density * size < 1:
            raise ValueError(f"density {density} keeps 0 of {size} {name}: raise the density")


def keep_pattern(method, density):
    """Make the masks of a `Masked` method whose pattern is n:m, bxb, "unit" or "head"."""
    pattern = method.settings.pattern
    n, m = n_of_m(pattern)
    if n:
        for linear in method.linears:
            linear.mask.copy_(n_of_m_mask(method.rank(linear), density, m))
        return
    shares = dict(zip(method.masked, method.shares(density)))  # {letter: densities (L)}
    for letters in tied_letters(method.model, pattern):
        keep_blocks(method, letters, torch.stack([shares.pop(letter) for letter in letters]))
    side = side_of(pattern)
    for letter, alone in shares.items():
        if side:
            keep_squares(method, method.masked[letter], alone, side)
        else:
            method.keep_weights(method.masked[letter], alone)


def keep_squares(method, linears, shares, side):
    """Mask matrices of one shape by square blocks: the blocks of the largest mean score stay.

    `shares` are the densities of the matrices, (B).
    """
    scores = [squares(method.rank(linear), side) for linear in linears]
    means = torch.stack([s.mean((1, 3), dtype=widest(s)) for s in scores])  # see `block_values`
    masks, _ = top_k_masks(means.flatten(1), shares * means[0].numel())  # (B, blocks)
    for linear, mask in zip(linears, masks):
        squares(linear.mask, side).copy_(mask.view_as(means[0])[:, None, :, None])


def squares(matrix, side):
    """Return a view (out / b, b, in / b, b) of a matrix; a square is [i, :, j, :]."""
    return matrix.unflatten(0, (-1, side)).unflatten(2, (-1, side))


def keep_blocks(method, letters, shares):
    """Mask the matrices of tied letters by blocks: the blocks of the largest mean score stay.

    `shares` is (letters, L); a layer gets the mean of its letters.
    """
    layers = list(zip(*[method.masked[letter] for letter in letters]))
    count = blocks_in(method, letters)
    values = [block_values([method.rank(linear) for linear in layer], count) for layer in layers]
    masks, _ = top_k_masks(torch.stack(values), count * shares.mean(0))
    for layer, mask in zip(layers, masks):
        for part in by_blocks([linear.mask for linear in layer], count):
            part.copy_(mask[:, None, None])  # (count,) -> (count, rows of a block, columns)


def by_blocks(matrices, count):
    """Return views (count, rows of a block, columns) of matrices that are tied, the last turned."""
    turned = [*matrices[:-1], matrices[-1].T]
    return [matrix.unflatten(0, (count, -1)) for matrix in turned]


def block_values(scores, count):
    """Return the mean score of each of `count` blocks, (count,); summed in float64.

    In float32 the order of a sum, which depends on the threads, could change which block is larger.
    """
    wide = [s.to(widest(s)) for s in scores]
    size = sum(s.numel() for s in scores) / count
    return (sum(part.sum((1, 2)) for part in by_blocks(wide, count)) / size).float()


def n_of_m_mask(scores, density, m):
    """Return (out, in) bool: of every m neighbours in a row the density * m largest stay.

    Among equals the first stay. Where density * m is not whole, the groups whose next score is
    largest keep one more, so that the density is exact.
    """
    values = scores.detach().unflatten(1, (-1, m))  # (out, in) -> (out, in / m, m)
    rank = ranks_in_groups(values)
    n = math.floor(density * m + 1e-9)
    mask = rank < n
    missing = int(density * scores.numel()) - n * values[..., 0].numel()
    if missing > 0:
        following = torch.where(rank == n, values, 0.0).sum(2)  # (out, in / m)
        count = torch.full((1,), missing, device=scores.device)
        (chosen,), _ = top_k_masks(following.view(1, -1), count)  # a sort: never wrong
        mask |= (rank == n) & chosen.view_as(following)[..., None]
    return mask.flatten(1)  # (out, in / m, m) -> (out, in)


def ranks_in_groups(values):
    """Return how many values of its group beat each value (..., m); of equals the first wins."""
    ranks = torch.zeros_like(values, dtype=torch.int8)
    for i in range(values.size(-1)):  # all pairs: for small m faster than to sort
        for j in range(i):
            later_wins = values[..., i] > values[..., j]
            ranks[..., j] += later_wins
            ranks[..., i] += ~later_wins
    return ranks
