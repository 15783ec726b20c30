"""The matrices of a model: which there are, and those of one shape as one tensor.

A model offers `layers`, and `matrices` {letter: name in a layer}. See the end of class Bert. The
*peers* of a matrix are the same matrix in each of the L layers.
"""

import itertools

import torch


def encoder_matrices(model):
    """Return {letter: [the linear layer of that matrix in each of the L layers]}."""
    return {
        letter: [layer.get_submodule(name) for layer in model.layers]
        for letter, name in model.matrices.items()
    }


def encoder_linears(model):
    """Return the linear layers of all matrices in one list, letter by letter."""
    return [linear for peers in encoder_matrices(model).values() for linear in peers]


def by_shape(linears):
    """Return lists of linear layers that follow each other and have one shape.

    What is done to all matrices of a list at once costs one kernel, not one for each.
    """
    groups = itertools.groupby(linears, key=lambda linear: linear.weight.shape)
    return [list(group) for _, group in groups]


def lay_side_by_side(linears):
    """Move the scores of B masked layers of one shape into one tensor (B, out, in)."""
    if linears[0].scores is None:
        return
    together = torch.stack([linear.scores.detach() for linear in linears])
    for linear, scores in zip(linears, together):
        linear.scores.data = scores


def as_one(matrices):
    """Return B matrices of one shape as one tensor (B, out, in).

    It is no copy where they lie side by side in memory.
    """
    first = matrices[0]
    place = (first.untyped_storage()._cdata, first.storage_offset())
    for i, matrix in enumerate(matrices):
        here = (matrix.untyped_storage()._cdata, matrix.storage_offset() - i * matrix.numel())
        if here != place or not matrix.is_contiguous():
            return torch.stack(matrices)
    shape = (len(matrices), *first.shape)
    return first.as_strided(shape, (first.numel(), *first.stride()))


def in_float32(tensor):
    """Return a tensor of less precision than float32 in float32, and others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def widest(tensor):
    """Return float64, or float32 on MPS, which has none."""
    return torch.float32 if tensor.is_mps else torch.float64
