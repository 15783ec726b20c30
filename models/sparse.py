"""Sparse execution of BERT and RoBERTa on a CPU: matrices of few weights are stored as CSR.

Where the weights come in square blocks, as `--pattern 8x8` keeps them, they are stored as BSR.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from model import Bert, gelu
from models.compaction import compact
from support.matrices import encoder_linears
from support.patterns import squares
from support.terminal import UserError

# A matrix is stored as CSR up to this density. Measured on two cores, with the shapes of BERT-base
# and MiniLM and 32 to 512 tokens: CSR is 1.0 to 2.4 times as fast as the dense product at density
# 0.15, and 0.8 to 1.8 times at 0.2.
DENSEST = 0.15
# The same for BSR with these blocks. Measured in the same way with 32 and 256 tokens: 1.1 to 1.9
# times as fast at 0.2, and 0.9 to 1.5 times at 0.25.
DENSEST_IN_BLOCKS = 0.2
# Rows and columns of a block. The whole of BERT-base at 0.1 takes 1.06 to 1.17 times as long with
# 4, and 1.25 to 1.39 times with 16.
SIDE = 8
# So many tokens are computed at a time, so that what a layer makes stays in the cache. Measured
# with the whole of BERT-base: 128 are as fast, 1,024 up to 11% slower.
TOKENS = 256


def product(linear, x):
    """Return linear(x) as (out, B, T) for x (in, B, T), whether the weight is CSR or dense."""
    flat = x.flatten(1)  # (in, B, T) -> (in, B * T)
    y = torch.addmm(linear.bias[:, None], linear.weight, flat)  # (out, in) x (in, B * T)
    return y.unflatten(1, x.shape[1:])  # (out, B * T) -> (out, B, T)


def normalise(x, layer_norm):
    """Return layer_norm(x) for x (C, B, T)."""
    x = x - x.mean(0)
    x *= (x.square().mean(0) + layer_norm.eps).rsqrt()
    weight = layer_norm.weight[:, None, None]
    bias = layer_norm.bias[:, None, None]
    return torch.addcmul(bias, x, weight)


class SparseLayer(nn.Module):
    """A layer over activations (C, B, T).

    In this layout a product with a CSR matrix on the left transposes nothing.
    """

    def __init__(self, layer):
        super().__init__()
        self.attention = layer.attention
        self.intermediate = layer.intermediate
        self.output = layer.output
        self.hidden_act = layer.hidden_act

    def split_heads(self, x):
        """Return (B, H, T, D) from (C, B, T), contiguous because the fast kernel needs that."""
        heads = x.unflatten(0, (self.attention["self"].num_heads, -1))  # (C, B, T) -> (H, D, B, T)
        return heads.permute(2, 0, 3, 1).contiguous()  # (H, D, B, T) -> (B, H, T, D)

    def forward(self, hidden, mask, first_only=False):
        readers = hidden[..., :1] if first_only else hidden  # (C, B, R)
        inner = self.attention["self"]
        q = self.split_heads(product(inner.query, readers))  # (B, H, R, D)
        k = self.split_heads(product(inner.key, hidden))  # (B, H, T, D)
        v = self.split_heads(product(inner.value, hidden))  # (B, H, T, D)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=inner.scale)
        mixed = mixed.permute(1, 3, 0, 2).flatten(0, 1)  # (B, H, R, D) -> (C, B, R)
        output = self.attention["output"]
        readers = normalise(readers + product(output.dense, mixed), output.LayerNorm)
        units = product(self.intermediate["dense"], readers)  # (F, B, R)
        units = gelu(units, self.hidden_act)
        return normalise(readers + product(self.output.dense, units), self.output.LayerNorm)


class SparseBertModel(nn.Module):
    """What stands in place of a BertModel, for evaluation. It has the same inputs and outputs."""

    def __init__(self, bert):
        super().__init__()
        layers = [SparseLayer(layer) for layer in bert.encoder["layer"]]
        self.embeddings = bert.embeddings
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = getattr(bert, "pooler", None)

    def forward(self, input_ids, attention_mask, token_type_ids, first_only=False):
        count = max(1, TOKENS // input_ids.size(1))  # examples at a time
        parts = zip(
            input_ids.split(count),
            attention_mask.split(count),
            token_type_ids.split(count),
            strict=True,
        )
        done = [self.forward_part(*part, first_only) for part in parts]
        return torch.cat(done)

    def forward_part(self, input_ids, attention_mask, token_type_ids, first_only):
        hidden = self.embeddings(input_ids, token_type_ids)
        hidden = hidden.permute(2, 0, 1).contiguous()  # (B, T, C) -> (C, B, T)
        mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        *body, last = self.encoder["layer"]
        for layer in body:
            hidden = layer(hidden, mask)
        return last(hidden, mask, first_only).permute(1, 2, 0)  # (C, B, R) -> (B, R, C)


@torch.no_grad()
def sparse(model):
    """Compact a model in place, and store as CSR or BSR the matrices that are faster so.

    Return how many these are. Raises UserError for a decoder.
    """
    if not isinstance(model, Bert):
        name = type(model).__name__
        raise UserError(f"sparse: CSR is for BERT and RoBERTa, not for {name}; compact is for all")
    compact(model)
    thin = []
    for linear in encoder_linears(model):
        densest = DENSEST_IN_BLOCKS if in_blocks(linear.weight) else DENSEST
        if linear.weight.count_nonzero() <= densest * linear.weight.numel():
            thin.append(linear)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # CSR is new in torch, and not checked
        for linear in thin:
            linear.weight = nn.Parameter(to_sparse(linear.weight), requires_grad=False)
    model.bert = SparseBertModel(model.bert)
    return len(thin)


def in_blocks(weight):
    """Do the weights that are not zero fill at least nine tenths of their blocks?"""
    if weight.size(0) % SIDE or weight.size(1) % SIDE:
        return False
    kept = squares(weight != 0, SIDE)  # (out / b, b, in / b, b)
    used = kept.any(3).any(1).count_nonzero()  # blocks
    return bool(kept.count_nonzero() >= 0.9 * used * SIDE**2)


def to_sparse(weight):
    """Return a weight as BSR where it comes in blocks, else as CSR.

    The places of CSR have 32 bits, which MKL reads without converting them.
    """
    if in_blocks(weight):
        return weight.to_sparse_bsr((SIDE, SIDE))
    csr = weight.to_sparse_csr()
    rows = csr.crow_indices().int()
    columns = csr.col_indices().int()
    return torch.sparse_csr_tensor(rows, columns, csr.values(), csr.shape)
