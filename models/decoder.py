"""What all decoders share: causal attention, the LM head, and random weights.

Axes: B texts, T tokens, R tokens with a query, C hidden size, H attention heads, G heads of keys
and values, D the size of a head, V vocabulary, n decisions.
"""

import math

import torch
import torch.nn.functional as F

from model import attend_with_dropout
from models.causal import Causal
from support.matrices import in_float32


def attend(q, k, v, mask, dropout, scale):
    """Let queries (B, H, R, D) read keys and values (B, G, T, D); return (B, R, H * D).

    H / G query heads that follow each other share a head of keys and values. `mask`, (B, 1, R, T),
    is set where a token attends to a key; None: to all tokens up to itself.
    """
    share = q.size(1) // k.size(1)
    if share > 1:
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)  # (B, H, T, D)
    if dropout and q.is_cpu:
        before = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
        mixed = attend_with_dropout(q, k, v, before, dropout, scale)
    else:
        options = {"attn_mask": mask, "dropout_p": dropout, "is_causal": mask is None}
        mixed = F.scaled_dot_product_attention(q, k, v, **options, scale=scale)
    return mixed.transpose(1, 2).flatten(2)  # (B, H, R, D) -> (B, R, H * D)


class LanguageModel(Causal):
    """A decoder with its LM head, which predicts the next token.

    The arguments are those of `Bert`. There is one output head, so that most of them say nothing.
    A class has, besides what stands in `Bert`, a `body`, see `Decoder` of models/gpt2.py, and
    `head_weight`, the matrix (V, C) of the LM head.
    """

    mlm_class = None
    drawn_smaller = ()  # how the names end of matrices whose random weights are smaller

    def __init__(
        self, config, output_head, outputs=0, words=(), pooler=False, mlm=False, form="vocabulary"
    ):
        super().__init__()
        self.config = config
        self.output_head = output_head
        self.outputs = outputs
        self.form = form

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, reads=None):
        """Return the logits (B, T, V) of the next token, or at places `reads` (n,) alone, (n, V).

        The inputs are (B, T), with the padding at the end, where no token attends to it. A place is
        counted over all B * T. The logits are float32. The logits of all places would need ten
        times the memory.
        """
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        hidden = self.body(input_ids, positions)  # (B, T, C)
        if reads is not None:
            hidden = hidden.flatten(0, 1)[reads]  # (n, C)
        return self.logits(hidden)

    def logits(self, hidden):
        """Return the logits (..., V) of `hidden` (..., C), in float32."""
        return in_float32(F.linear(hidden, self.head_weight))

    @property
    def num_heads(self):
        return self.config.num_attention_heads

    @property
    def head_name(self):
        """Return the name of the head. Where it is tied, no parameter has it."""
        return self.heads[self.form][0]

    @property
    def hub_class(self):
        """Return the name of the class of transformers that computes the same."""
        return self.heads[self.form][1]

    def to_hub(self, state):
        """Return a state dict under the names of Hugging Face's layout."""
        return state

    @classmethod
    def draw(cls, shapes, seed):
        """Return {name: tensor} of random weights for {name: shape} (Radford et al. 2019, 2.3).

        They are from N(0, 0.02). The n matrices of `drawn_smaller`, which end on the residual
        stream, are from N(0, 0.02 / sqrt(n)).
        """
        generator = torch.Generator().manual_seed(seed)
        smaller = [name for name in shapes if name.endswith(cls.drawn_smaller)]
        tensors = {}
        for name, shape in shapes.items():
            tensors[name] = torch.zeros(shape)
            if len(shape) > 1:
                std = 0.02 / math.sqrt(len(smaller)) if name in smaller else 0.02
                tensors[name].normal_(0.0, std, generator=generator)
            elif name.endswith("weight"):
                tensors[name] += 1  # of a norm
        return tensors


def drop_tied_head(tensors, embedding):
    """Remove the LM head from {name: tensor}, to whose matrix `embedding` it is tied.

    A file may have one of the two alone. Raises ValueError where they differ.
    """
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.setdefault(embedding, head)):
        raise ValueError("lm_head.weight differs from the word embeddings, to which it is tied")
