"""GPT-2 by hand (Radford et al. 2019): a decoder, in Hugging Face's layout in and out.

Its files join Q, K and V in one matrix, and hold each matrix as (in, out). On load they are split
and transposed. So a layer has the same six matrices as BERT's, and everything in prune.py applies.
On save they are joined again.

Axes: B texts, T tokens, C hidden size, H attention heads, D = C/H, F feed-forward size,
V vocabulary, n decisions.
"""

from dataclasses import dataclass

import torch
from torch import nn

from model import BY_TANH, EXACT, gelu
from models.decoder import LanguageModel, attend, drop_tied_head
from support.matrices import in_float32

# The six matrices of a layer: the papers' letter for each, and its name in the layer.
MATRICES = {
    "Q": "attn.query",
    "K": "attn.key",
    "V": "attn.value",
    "O": "attn.c_proj",
    "U": "mlp.c_fc",
    "D": "mlp.c_proj",
}
PARTS = ("wte.", "wpe.", "h.", "ln_f.")  # how the names of what is inside begin
JOINED = ("query", "key", "value")  # the parts of c_attn, in order
TRANSPOSED = ("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def another_name(name):
    """Return a property that reads and sets the attribute `name`."""
    return property(lambda self: getattr(self, name), lambda self, x: setattr(self, name, x))


@dataclass
class GPT2Config:
    """The keys of Hugging Face's config.json that shape the network, with the values of `gpt2`."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 0  # 0: four times n_embd
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    activation_function: str = "gelu_new"
    bos_token_id: object = 50256  # nothing computes with these: they are written as they were read
    eos_token_id: object = 50256

    framed = False  # no special tokens stand around a text
    type_vocab_size = 1  # there are no token types
    # What further keys may be, the value first that they have if they are not there.
    supported = {
        "activation_function": (*BY_TANH, *EXACT),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "is_causal": (True,),
    }
    # The names that `transformers` takes for the same.
    other_names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    def __post_init__(self):
        self.n_inner = self.n_inner or 4 * self.n_embd

    @classmethod
    def in_one_form(cls, raw):
        return {cls.other_names.get(key, key): value for key, value in raw.items()}

    # the names that BERT's config has for the same
    hidden_size = another_name("n_embd")
    intermediate_size = another_name("n_inner")
    num_hidden_layers = another_name("n_layer")
    num_attention_heads = another_name("n_head")
    positions = another_name("n_positions")


# ---------- the decoder ---------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Causal attention: a token attends to itself and to those before it."""

    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, width)
        self.num_heads = config.n_head
        self.scale = (width // config.n_head) ** -0.5
        self.dropout = config.attn_pdrop

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def forward(self, x, mask, cache):
        """Let `x` (B, R, C) attend to what `cache` holds and to itself, see `Decoder`."""
        q = self.split_heads(self.query(x))
        k = self.split_heads(self.key(x))
        v = self.split_heads(self.value(x))
        if cache is not None:
            k, v = cache.add(k, v)  # (B, H, R, D) -> (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        return self.c_proj(attend(q, k, v, mask, dropout, self.scale))  # (B, R, C)


class Layer(nn.Module):
    """One pre-LN layer."""

    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        up = nn.Linear(width, config.n_inner)
        down = nn.Linear(config.n_inner, width)
        self.ln_1 = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(width, eps=config.layer_norm_epsilon)
        self.mlp = nn.ModuleDict({"c_fc": up, "c_proj": down})
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.hidden_act = config.activation_function

    def forward(self, x, mask, cache):
        x = x + self.dropout(self.attn(self.ln_1(x), mask, cache))  # (B, R, C)
        inner = gelu(self.mlp["c_fc"](self.ln_2(x)), self.hidden_act)  # (B, R, F)
        return x + self.dropout(self.mlp["c_proj"](inner))  # (B, R, F) -> (B, R, C)


class Decoder(nn.Module):
    """The embeddings, the layers, and the last LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, input_ids, positions, mask=None, caches=None):
        """Return the last hidden states, (B, R, C), of tokens `input_ids`, (B, R).

        `positions` are (B, R) or (R,). `caches` hold the keys and values of earlier tokens, one for
        each layer, see `Causal`. `mask`, (B, 1, R, T), is set where a token attends to a key; None:
        to all tokens up to itself.
        """
        x = in_float32(self.wte(input_ids)) + in_float32(self.wpe(positions))  # (B, R, C)
        x = self.dropout(x)
        for layer, cache in zip(self.h, caches or [None] * len(self.h)):
            x = layer(x, mask, cache)
        return self.ln_f(x)


def turn(tensor):
    """Return a matrix (out, in) as (in, out), or the reverse; a vector as it is."""
    return tensor.T.contiguous() if tensor.dim() > 1 else tensor.contiguous()


class GPT2(LanguageModel):
    """The decoder with its LM head, which is the word embedding matrix (tied)."""

    Config = GPT2Config
    matrices = MATRICES
    attention_letters = "QKVO"
    feed_forward_letters = "UD"
    heads = {"vocabulary": ("lm_head", "GPT2LMHeadModel")}
    inner = "transformer."  # how the names of what is inside begin
    drawn_smaller = ("attn.c_proj.weight", "mlp.c_proj.weight")

    def __init__(self, config, *head, **options):
        super().__init__(config, *head, **options)
        self.transformer = Decoder(config)

    @property
    def body(self):
        return self.transformer

    @property
    def head_weight(self):
        return self.transformer.wte.weight

    @property
    def layers(self):
        return self.transformer.h

    @property
    def embeddings(self):
        return nn.ModuleList([self.transformer.wte, self.transformer.wpe])

    # files

    @staticmethod
    def from_hub(tensors, config):
        """Return {name: tensor} under our names, from those of Hugging Face's layout.

        The prefix `transformer.` may be missing. Raises ValueError for an LM head of its own.
        """
        ours = {}
        for full_name, tensor in tensors.items():
            name = full_name.removeprefix("transformer.")
            if not name.startswith(PARTS):
                ours[full_name] = tensor  # of a head
                continue
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # the causal mask, which old versions saved
            if ".attn.c_attn." in name:
                for part, piece in zip(JOINED, tensor.chunk(3, dim=-1)):  # (C, 3C) -> (C, C) each
                    ours[f"transformer.{name.replace('c_attn', part)}"] = turn(piece)
                continue
            if name.endswith(TRANSPOSED):
                tensor = turn(tensor)
            ours[f"transformer.{name}"] = tensor
        drop_tied_head(ours, "transformer.wte.weight")
        return ours

    def to_hub(self, state):
        """Return a state dict under the names of Hugging Face's layout."""
        hub = {}
        for name, tensor in state.items():
            if ".attn.query." in name:
                parts = [turn(state[name.replace("query", part)]) for part in JOINED]
                hub[name.replace("query", "c_attn")] = torch.cat(parts, dim=-1)
            elif not name.rpartition(".")[0].endswith((".attn.key", ".attn.value")):
                hub[name] = turn(tensor) if name.endswith(TRANSPOSED) else tensor
        return hub
