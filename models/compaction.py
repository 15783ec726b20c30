"""Exact compaction: the same function with fewer weights.

What a mask makes constant or unread is folded away. This file knows how the six matrices of a layer
work together, and a model's `matrices` say where they are, in an encoder as in a decoder.
"""

import copy
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from model import gelu
from support.matrices import encoder_linears
from support.terminal import UserError


def linear_of(weight, bias):
    """Return an nn.Linear with these values, in float32 and not trainable."""
    linear = nn.Linear(1, 1, device="meta")  # with its own sizes it would warn of an empty matrix
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.float())
    linear.bias = nn.Parameter(bias.float())
    return linear.requires_grad_(False)


def compact_feed_forward(up, down, hidden_act):
    """Return (U, D) without the units that are constant or unread.

    A unit with an empty row of U is constant: it is GELU of its bias, which goes into the bias of
    D. A unit with an empty column of D is unread.
    """
    weight = down.weight.double()  # (C, F)
    constant = ~up.weight.any(1)  # (F,)
    unread = ~down.weight.any(0)  # (F,)
    values = gelu(up.bias.double()[constant], hidden_act)
    bias = down.bias.double() + weight[:, constant] @ values  # (C, n) x (n,) -> (C,)
    keep = ~constant & ~unread
    if not keep.any():  # one unit that computes 0: ONNX Runtime quantises no matrix without rows
        keep[0] = True
        weight = torch.zeros_like(weight)
    return linear_of(up.weight[keep], up.bias[keep]), linear_of(weight[:, keep], bias)


@dataclass
class AttentionHead:
    """What compaction leaves of an attention head: n dimensions of Q and K, m of V."""

    q: torch.Tensor  # (n, C)
    q_bias: torch.Tensor  # (n,)
    k: torch.Tensor  # (n, C)
    k_bias: torch.Tensor  # (n,)
    v: torch.Tensor  # (m, C)
    v_bias: torch.Tensor  # (m,)
    o: torch.Tensor  # (m, C), the columns of O as rows


def attention_of(layer, matrices):
    """Return the module of a layer that has Q and the number of heads."""
    return layer.get_submodule(matrices["Q"].rpartition(".")[0])


def compact_attention(layer, matrices):
    """Compact the Q, K, V and O of a layer in place.

    Return the number of query dimensions of each head, and that of value dimensions.
    """
    q, k, v, o = [in_float64(layer.get_submodule(matrices[letter])) for letter in "QKVO"]
    attention = attention_of(layer, matrices)
    bias = o.bias
    heads = []
    for rows in torch.arange(q.out_features).chunk(attention.num_heads):  # (D,)
        # Attention weights sum to one, so that a value with an empty row is always its bias.
        constant = ~v.weight[rows].any(1)
        fixed = rows[constant]
        bias = bias + o.weight[:, fixed] @ v.bias[fixed]  # (C, n) x (n,) -> (C,)
        read = o.weight[:, rows].any(0)
        values = rows[~constant & read]
        if len(values):  # a head without value dimensions goes
            heads.append(compact_head(q, k, v, o, rows, values))
    if not heads:
        heads = [head_of_zero(o.weight)]

    padded = {}
    for field in fields(AttentionHead):
        padded[field.name] = pad_heads([getattr(head, field.name) for head in heads])
    layer.set_submodule(matrices["Q"], linear_of(padded["q"], padded["q_bias"]))
    layer.set_submodule(matrices["K"], linear_of(padded["k"], padded["k_bias"]))
    layer.set_submodule(matrices["V"], linear_of(padded["v"], padded["v_bias"]))
    layer.set_submodule(matrices["O"], linear_of(padded["o"].T.contiguous(), bias))
    attention.num_heads = len(heads)  # its scale stays that of the original head size
    return [len(head.q) for head in heads], [len(head.v) for head in heads]


def in_float64(linear):
    """Return a copy of a linear layer in float64."""
    return copy.deepcopy(linear).double()


def compact_head(q, k, v, o, rows, values):
    """Return the AttentionHead with the rows `rows` of Q and K, and the rows `values` of V.

    - A key dimension with an empty row adds the same to every logit of a query, and the softmax
      cancels it.
    - The query dimensions with empty rows are constants. All of a head become one dimension, whose
      query is 1 and whose key is sum_d b_q[d] K[d].
    """
    rows = rows[k.weight[rows].any(1)]
    live = q.weight[rows].any(1)
    fixed = rows[~live]
    rows = rows[live]
    head = AttentionHead(
        q=q.weight[rows],
        q_bias=q.bias[rows],
        k=k.weight[rows],
        k_bias=k.bias[rows],
        v=v.weight[values],
        v_bias=v.bias[values],
        o=o.weight[:, values].T,  # (C, m) -> (m, C)
    )
    merged = q.bias[fixed] @ k.weight[fixed]  # (n,) x (n, C) -> (C,)
    if merged.any() or not len(rows):  # a head keeps at least one dimension
        zero = merged.new_zeros(1)
        one = merged.new_ones(1)
        head.q = torch.cat([head.q, torch.zeros_like(merged)[None]])
        head.q_bias = torch.cat([head.q_bias, one])
        head.k = torch.cat([head.k, merged[None]])
        head.k_bias = torch.cat([head.k_bias, zero])
    return head


def head_of_zero(weight):
    """Return a head of one dimension that computes 0, for a layer of which no head is left."""
    row = weight.new_zeros(1, weight.size(0))  # (1, C)
    zero = weight.new_zeros(1)
    return AttentionHead(q=row, q_bias=zero, k=row, k_bias=zero, v=row, v_bias=zero, o=row)


def pad_heads(parts):
    """Return (H * n, ...) from the parts (n_h, ...) of H heads: each is padded with zeros to n.

    Padding once saves it in every forward.
    """
    return pad_sequence(list(parts), batch_first=True).flatten(0, 1)  # (H, n, ...) -> (H * n, ...)


def pad_units(layer, matrices, units):
    """Add units of zeros to a layer until it has `units` of them."""
    up, down = [layer.get_submodule(matrices[letter]) for letter in "UD"]
    more = units - up.out_features
    weight = F.pad(up.weight, (0, 0, 0, more))  # (n, C) -> (F, C)
    layer.set_submodule(matrices["U"], linear_of(weight, F.pad(up.bias, (0, more))))
    weight = F.pad(down.weight, (0, more))  # (C, n) -> (C, F)
    layer.set_submodule(matrices["D"], linear_of(weight, down.bias))


@torch.no_grad()
def compact(model, uniform=False, drop_rows=0):
    """Compact a model in place, for evaluation. Its function stays, with fewer weights.

    Return [query dimensions of each head, value dimensions of each head, units] of each layer.
    `uniform`: only units of the feed-forward part are removed, the same number in every layer,
    because the classes of `transformers` can hold no more. `drop_rows`: rows with fewer weights
    are emptied first, which changes the function. Raises UserError for other matrices than BERT's.
    """
    if "".join(model.matrices) != "QKVOUD":
        name = type(model).__name__
        expected = "export writes its model with the masks applied"
        raise UserError(f"compact: not offered for {name}, whose layers have a gate; {expected}")
    for linear in encoder_linears(model):
        thin = linear.weight.count_nonzero(dim=1) < drop_rows  # (out,)
        linear.weight[thin] = 0.0
    matrices = model.matrices
    sizes = []
    for layer in model.layers:
        up, down = [layer.get_submodule(matrices[letter]) for letter in "UD"]
        up, down = compact_feed_forward(up, down, layer.hidden_act)
        layer.set_submodule(matrices["U"], up)
        layer.set_submodule(matrices["D"], down)
        heads = ([], [])  # the query and the value dimensions of each head; uniform: not said
        if not uniform:
            heads = compact_attention(layer, matrices)
        sizes.append([*heads, up.out_features])
    if uniform:
        most = max(1, *[units for _, _, units in sizes])
        model.config.intermediate_size = most
        for layer in model.layers:
            pad_units(layer, matrices, most)
    return sizes


# ---------- heads of different sizes --------------------------------------------------------------
#
# In a layer all heads are padded to the largest. A file holds them without this padding.


def matrix_names(model):
    """Return {letter: name of that matrix in the state dict} for each layer."""
    name_of = {module: name for name, module in model.named_modules()}
    names = []
    for layer in model.layers:
        prefix = name_of[layer]
        names.append({letter: f"{prefix}.{name}" for letter, name in model.matrices.items()})
    return names


def change_heads(state, names, sizes, change):
    """Replace in a state dict whatever is divided into heads by change(tensor, sizes of the heads).

    These are the rows of Q, K and V, and the columns of O. `names`: see `matrix_names`.
    """
    for name_of, (query_sizes, value_sizes, _) in zip(names, sizes, strict=True):
        for letter, of_heads in (("Q", query_sizes), ("K", query_sizes), ("V", value_sizes)):
            for part in ("weight", "bias"):
                name = f"{name_of[letter]}.{part}"
                state[name] = change(state[name], of_heads)
        name = f"{name_of['O']}.weight"
        state[name] = change(state[name].T, value_sizes).T.contiguous()


def add_padding(tensor, sizes):
    """Return (H * n, ...) from (sum of `sizes`, ...): each head is padded with zeros to n."""
    return pad_heads(tensor.split(sizes))


def drop_padding(tensor, sizes):
    """Undo `add_padding`."""
    heads = tensor.unflatten(0, (len(sizes), -1))  # (H * n, ...) -> (H, n, ...)
    return torch.cat([head[:size] for head, size in zip(heads, sizes, strict=True)])
