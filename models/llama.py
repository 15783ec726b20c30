"""Llama by hand (Touvron et al. 2023), and its relatives Mistral and Qwen2, under their own names.

They differ from GPT-2 in four ways. A norm divides by the root mean square, without a mean. Queries
and keys are turned by angles that grow with the position (Su et al. 2021), so that there are no
position embeddings. Several query heads share a head of keys and values (Ainslie et al. 2023). The
feed-forward part has a third matrix, the gate (Shazeer 2020). So a layer has seven matrices.

Axes: B texts, T tokens, R tokens with a query, C hidden size, H attention heads, G heads of keys
and values, D the size of a head, F feed-forward size, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models.decoder import LanguageModel, attend, drop_tied_head
from models.llama_config import SCALING, LlamaConfig, MistralConfig, Qwen2Config
from support.matrices import in_float32

# The seven matrices of a layer: a letter for each, and its name in the layer.
MATRICES = {
    "Q": "self_attn.q_proj",
    "K": "self_attn.k_proj",
    "V": "self_attn.v_proj",
    "O": "self_attn.o_proj",
    "G": "mlp.gate_proj",
    "U": "mlp.up_proj",
    "D": "mlp.down_proj",
}

# ---------- the decoder ---------------------------------------------------------------------------


def frequencies(config, device):
    """Return by how much each pair of dimensions turns from a position to the next, (D/2,).

    With the scaling "llama3" a pair that turns slowly, less than `low_freq_factor` times in the
    original positions, turns slower by `factor`. One that turns more than `high_freq_factor` times
    stays as it is. In between the two are mixed.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    turns = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    if config.rope_scaling is None:
        return turns
    factor, low, high, original = [config.rope_scaling[key] for key in SCALING]
    rounds = original * turns / (2 * math.pi)
    kept = ((rounds - low) / (high - low)).clamp(0, 1)  # 1: it stays as it is
    return kept * turns + (1 - kept) * turns / factor


def rotate(x, cos, sin):
    """Turn dimensions i and i + D/2 of x (B, H, R, D) together; cos and sin are (..., R, D/2)."""
    a, b = x.chunk(2, dim=-1)  # (B, H, R, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal attention with rotary positions, and G heads of keys and values."""

    def __init__(self, config):
        super().__init__()
        width, size = config.hidden_size, config.head_dim
        queries = config.num_attention_heads * size
        shared = config.num_key_value_heads * size
        bias = config.attention_bias
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, shared, bias=bias)
        self.v_proj = nn.Linear(width, shared, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=bias and config.output_bias)
        self.size = size
        self.dropout = config.attention_dropout

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)  # (B, R, H*D) -> (B, H, R, D)

    def forward(self, x, turned, mask, cache):
        """Let `x` (B, R, C) attend to what `cache` holds and to itself, see `Decoder`."""
        q = rotate(self.split_heads(self.q_proj(x)), *turned)
        k = rotate(self.split_heads(self.k_proj(x)), *turned)
        v = self.split_heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.add(k, v)  # (B, G, R, D) -> (B, G, T, D)
        dropout = self.dropout if self.training else 0.0
        return self.o_proj(attend(q, k, v, mask, dropout, self.size**-0.5))  # (B, R, C)


class FeedForward(nn.Module):
    """SwiGLU: what goes up is multiplied by a gate, and comes down."""

    def __init__(self, config):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, R, F) -> (B, R, C)


class Layer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x, turned, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), turned, mask, cache)  # (B, R, C)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The embeddings, the layers, and the last norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids, positions, mask=None, caches=None):
        """Return the last hidden states, (B, R, C); see `Decoder` of models/gpt2.py."""
        x = in_float32(self.embed_tokens(input_ids))  # (B, R, C)
        angles = positions[..., None] * frequencies(self.config, x.device)  # (..., R, D/2)
        angles = angles.unsqueeze(-3)  # the same for all heads
        turned = angles.cos(), angles.sin()
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers)):
            x = layer(x, turned, mask, cache)
        return self.norm(x)


class Llama(LanguageModel):
    """The decoder with its LM head, which is the word embedding matrix or a matrix of its own."""

    Config = LlamaConfig
    matrices = MATRICES
    attention_letters = "QKVO"
    feed_forward_letters = "GUD"
    heads = {"vocabulary": ("lm_head", "LlamaForCausalLM")}
    inner = "model."

    def __init__(self, config, *head, **options):
        super().__init__(config, *head, **options)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def body(self):
        return self.model

    @property
    def head_weight(self):
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def layers(self):
        return self.model.layers

    @property
    def embeddings(self):
        return self.model.embed_tokens

    @property
    def num_heads(self):
        """Return G: a head of keys and values is pruned with the query heads that share it."""
        return self.config.num_key_value_heads

    @staticmethod
    def from_hub(tensors, config):
        """Return {name: tensor} under our names. The prefix `model.` may be missing.

        Raises ValueError for an LM head of its own where config.json says that it is tied.
        """
        ours = {}
        for name, tensor in tensors.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue  # a buffer that old versions saved
            bare = name.startswith(("embed_tokens.", "layers.", "norm."))
            ours[f"model.{name}" if bare else name] = tensor
        if config.tie_word_embeddings:
            drop_tied_head(ours, "model.embed_tokens.weight")
        return ours


class Mistral(Llama):
    """Llama with other values in its config."""

    Config = MistralConfig
    heads = {"vocabulary": ("lm_head", "MistralForCausalLM")}


class Qwen2(Llama):
    """Llama with biases on Q, K and V."""

    Config = Qwen2Config
    heads = {"vocabulary": ("lm_head", "Qwen2ForCausalLM")}
