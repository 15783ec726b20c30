"""BERT by hand (Devlin et al., NAACL 2019, arXiv 1810.04805).

- Every parameter has the name that Hugging Face gives it. Loading and saving need no map of names.
- There are two output heads: a new linear layer (plain fine-tuning), and the frozen head that
  predicted words in pretraining, where each class has a label word (SMP).
- Where only position 0 is read, the last layer computes only that position, which is exact. It
  saves 10/12 of the layer's products: K and V remain, each 1/12 of them.

Nothing here knows of pruning, of tasks or of files. What a pruner, a loader and an exporter may ask
of a model stands in class `Bert`. models/checkpoint.py reads and writes its weights.

Axes: B examples, T tokens, R positions with a query, C hidden size, H attention heads, D = C/H,
F feed-forward size, V vocabulary, K outputs.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# The six matrices of a layer: the papers' letter for each, and its name in the layer.
MATRICES = {
    "Q": "attention.self.query",
    "K": "attention.self.key",
    "V": "attention.self.value",
    "O": "attention.output.dense",
    "U": "intermediate.dense",
    "D": "output.dense",
}


@dataclass
class BertConfig:
    """The keys of Hugging Face's config.json that shape the network, with BERT-base's values."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pad_token_id: int = 0
    hidden_act: str = "gelu"

    framed = True  # special tokens stand around a text

    @property
    def head_act(self):
        """Return the activation of the MLM head."""
        return self.hidden_act

    @property
    def positions(self):
        """Return the number of tokens that a text can have."""
        return self.max_position_embeddings


# The names of GELU in config.json: of the exact one, and of its approximation by tanh.
EXACT = ("gelu", "gelu_python")
BY_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def gelu(x, name):
    """Return GELU(x), exact or by tanh, as config.json names it."""
    return F.gelu(x, approximate="none" if name in EXACT else "tanh")


# ---------- the encoder ---------------------------------------------------------------------------
#
# An nn.ModuleDict stands where Hugging Face has a level of names and the mathematics has none.


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, normalised."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids):
        if self.token_type_embeddings.num_embeddings == 1:  # the tokenizer may give type 1, too
            token_type_ids = torch.zeros_like(token_type_ids)
        hidden = self.word_embeddings(input_ids)  # (B, T, C), in bf16 if they are kept in it
        hidden = hidden.to(self.LayerNorm.weight.dtype)
        hidden = hidden + self.token_type_embeddings(token_type_ids) + self.positions(input_ids)
        return self.dropout(self.LayerNorm(hidden))

    def positions(self, input_ids):
        """Return the embeddings of the positions of all tokens, (T, C) or (B, T, C)."""
        return self.position_embeddings.weight[: input_ids.size(1)]


def attend_with_dropout(q, k, v, mask, dropout, scale):
    """Do what F.scaled_dot_product_attention does, on a CPU, where dropout makes that slow.

    A random number has 16 bits, so the probability of dropout is exact to 1e-5. q is (B, H, R, D),
    k and v are (B, H, T, D).
    """
    scores = scale * q @ k.transpose(-1, -2)  # (B, H, R, T)
    scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)
    p = torch.softmax(scores, -1, dtype=scores.dtype)
    bits = torch.empty(p.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: p.numel()].view_as(p)
    kept = bits >= round(dropout * 2**16) - 2**15
    return (p * kept) @ v / (1 - dropout)  # (B, H, R, T) x (B, H, T, D)


class SelfAttention(nn.Module):
    """Attention with H heads, without the output projection."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.num_heads = config.num_attention_heads
        self.scale = (width // self.num_heads) ** -0.5
        self.dropout = config.attention_probs_dropout_prob

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def forward(self, hidden, queries, mask):
        """Let `queries` (B, R, C) attend to `hidden` (B, T, C) where `mask` (B, 1, 1, T) is set."""
        q = self.split_heads(self.query(queries))
        k = self.split_heads(self.key(hidden))
        v = self.split_heads(self.value(hidden))
        dropout = self.dropout if self.training else 0.0
        attend = F.scaled_dot_product_attention
        if dropout and q.is_cpu:
            attend = attend_with_dropout
        mixed = attend(q, k, v, mask, dropout, scale=self.scale)
        return mixed.transpose(1, 2).flatten(2)  # (B, H, R, D) -> (B, R, C)


class Residual(nn.Module):
    """Post-LN: LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, config, in_features):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, residual):
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Layer(nn.Module):
    """One post-LN layer. With `first_only` only position 0 is computed (R = 1).

    Its keys and values still come from every position.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(config), "output": Residual(config, width)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = Residual(config, inner)
        self.hidden_act = config.hidden_act

    def forward(self, hidden, mask, first_only=False):
        queries = hidden[:, :1] if first_only else hidden  # (B, R, C)
        attended = self.attention["self"](hidden, queries, mask)
        attended = self.attention["output"](attended, queries)
        inner = gelu(self.intermediate["dense"](attended), self.hidden_act)  # (B, R, F)
        return self.output(inner, attended)  # (B, R, F) -> (B, R, C)


class BertModel(nn.Module):
    """The embeddings and the layers."""

    def __init__(self, config, pooler, embeddings):
        super().__init__()
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layer": layers})
        if pooler:
            dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.pooler = nn.ModuleDict({"dense": dense})

    def forward(self, input_ids, attention_mask, token_type_ids, first_only=False):
        """Return the last hidden states (B, T, C), or those of position 0 alone (B, 1, C).

        The three inputs are (B, T).
        """
        hidden = self.embeddings(input_ids, token_type_ids)
        mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T), True where there is a token
        *body, last = self.encoder["layer"]
        for layer in body:
            hidden = layer(hidden, mask)
        return last(hidden, mask, first_only)


# ---------- output heads --------------------------------------------------------------------------


class MLMHead(nn.Module):
    """Hugging Face's `cls.predictions`. Its decoder is the word embedding matrix (tied)."""

    def __init__(self, config):
        super().__init__()
        dense = nn.Linear(config.hidden_size, config.hidden_size)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.hidden_act = config.head_act

    def forward(self, hidden, embedding, ids=slice(None)):
        """Return the logits (..., K) of the words `ids` (default: all) for `hidden` (..., C)."""
        hidden = gelu(self.transform["dense"](hidden), self.hidden_act)
        hidden = self.transform["LayerNorm"](hidden)
        return F.linear(hidden, embedding[ids], self.bias[ids])  # (..., C) x (C, K) -> (..., K)


# The trained output head by its form: the name of its linear layer, and the class of transformers
# that has it.
HEADS = {
    "pooled": ("classifier", "BertForSequenceClassification"),  # of position 0, after a pooler
    "per token": ("classifier", "BertForTokenClassification"),
    "start and end": ("qa_outputs", "BertForQuestionAnswering"),  # two outputs per token
}


class Bert(nn.Module):
    """The encoder with an output head. Inputs are (B, T).

    The result is logits in float32: (B, K) at position 0, or (B, T, K) at every position where the
    `form` of the head is another than "pooled".

    `output_head="classifier"`: a new linear layer.
    `output_head="words"` (SMP, section 3): no new weight. The logit of a class is that of its label
    word in the MLM head. Where a model has no MLM head, it is h . e(word).
    """

    Config = BertConfig
    Embeddings = Embeddings
    matrices = MATRICES  # the matrices of a layer: letter -> name
    attention_letters = "QKVO"  # an attention head is rows of the first ones, columns of the last
    feed_forward_letters = "UD"  # so is a unit of the feed-forward part
    heads = HEADS
    mlm_class = "BertForMaskedLM"  # the class of transformers with an MLM head ...
    bare_class = "BertModel"  # ... and without a head
    inner = "bert."  # how the names of the parameters inside begin
    hub_prefix = "bert"  # what the names of a bare model lack
    hub_names = {}  # {prefix of a name in Hugging Face's layout: ours}, where they differ

    def __init__(
        self, config, output_head, outputs=0, words=(), pooler=True, mlm=True, form="pooled"
    ):
        super().__init__()
        self.config = config
        self.output_head = output_head
        self.outputs = len(words) or outputs
        self.form = form
        pooler = pooler or (output_head == "classifier" and self.first_only)
        self.bert = BertModel(config, pooler, self.Embeddings(config))
        if mlm:
            self.cls = nn.ModuleDict({"predictions": MLMHead(config)})
        if output_head == "classifier":
            # transformers has no dropout before `qa_outputs`
            p = 0.0 if form == "start and end" else config.hidden_dropout_prob
            self.dropout = nn.Dropout(p)
            self.add_module(self.head_name, nn.Linear(config.hidden_size, outputs))
        words = torch.tensor(words, dtype=torch.long, device="cpu")  # (K,) ids of label words
        self.register_buffer("words", words, persistent=False)

    @property
    def first_only(self):
        return self.form == "pooled"

    @property
    def head_name(self):
        """Return the name of the trained output head."""
        name, _ = self.heads[self.form]
        return name

    def forward(self, input_ids, attention_mask, token_type_ids):
        hidden = self.bert(input_ids, attention_mask, token_type_ids, self.first_only)  # (B, R, C)
        if self.first_only:
            hidden = hidden[:, 0]  # (B, 1, C) -> (B, C)
        embedding = self.bert.embeddings.word_embeddings.weight  # (V, C)
        if self.output_head == "classifier":
            if self.first_only:
                hidden = self.pool(hidden)
            head = self.get_submodule(self.head_name)
            logits = head(self.dropout(hidden))  # (..., C) -> (..., K)
        elif hasattr(self, "cls"):
            logits = self.cls["predictions"](hidden, embedding, self.words)  # (..., K)
        else:
            logits = F.linear(hidden, embedding[self.words])  # (..., C) x (C, K) -> (..., K)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def pool(self, hidden):
        return torch.tanh(self.bert.pooler["dense"](hidden))  # (B, C) -> (B, C)

    def mlm_logits(self, input_ids, attention_mask, token_type_ids):
        """Return the logits (B, T, V) of every word at every position, as in pretraining."""
        hidden = self.bert(input_ids, attention_mask, token_type_ids)
        return self.cls["predictions"](hidden, self.bert.embeddings.word_embeddings.weight)

    @property
    def layers(self):
        return self.bert.encoder["layer"]

    @property
    def embeddings(self):
        return self.bert.embeddings

    @property
    def num_heads(self):
        return self.config.num_attention_heads

    @property
    def hub_class(self):
        """Return the name of the class of transformers that computes the same."""
        if self.output_head == "classifier":
            _, name = self.heads[self.form]
            return name
        return self.mlm_class if hasattr(self, "cls") else self.bare_class

    def to_hub(self, state):
        """Return a state dict under the names of Hugging Face's layout."""
        return state
