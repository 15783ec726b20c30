"""What config.json says of Llama, Mistral and Qwen2.

Versions of `transformers` write the same in several forms. A key that changes the function, and
that we do not have, is refused by its name.
"""

from dataclasses import dataclass

# What the scaling "llama3" of the angles needs, see models/llama.py.
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class LlamaConfig:
    """The keys of config.json that shape the network, with Llama's values."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as attention heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: object = None  # or {key of SCALING: number}
    attention_bias: bool = False  # of Q, K, V and O
    mlp_bias: bool = False  # of G, U and D
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    bos_token_id: object = 1  # nothing computes with these: they are written as they were read
    eos_token_id: object = 2
    pad_token_id: object = None

    framed = False  # no special tokens stand around a text
    type_vocab_size = 1  # there are no token types
    output_bias = True  # O has a bias if Q, K and V have one
    assumed = {}  # what a key is that is not there, if that is none of `supported`
    # What further keys may be, the value first that they have if they are not there.
    supported = {
        "hidden_act": ("silu",),
        "attention_bias": (False, True),
        "mlp_bias": (False, True),
        "tie_word_embeddings": (False, True),
        "partial_rotary_factor": (1.0, None),
        "original_max_position_embeddings": (None,),  # it belongs into rope_scaling
        "is_causal": (True,),
    }

    def __post_init__(self):
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // max(1, heads)
        if heads % max(1, self.num_key_value_heads):
            shared = f"num_key_value_heads {self.num_key_value_heads}"
            raise ValueError(f"num_attention_heads {heads} is not a multiple of {shared}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; expected an even one, for rotation")

    @property
    def positions(self):
        return self.max_position_embeddings

    @classmethod
    def in_one_form(cls, raw):
        """Return what config.json says, with those keys in one form that have several.

        Raises ValueError where layers or rotary positions are of a kind that we do not have.
        """
        raw = cls.assumed | raw
        for key in ("num_key_value_heads", "head_dim"):
            raw[key] = raw.get(key, getattr(cls, key)) or 0
        for kind in raw.get("layer_types") or ():
            if kind != "full_attention":
                raise ValueError(f"layer_types has {kind!r}; expected 'full_attention' alone")
        theta, scaling = rotary_positions(raw, raw.get("max_position_embeddings"))
        return raw | {"rope_theta": theta, "rope_scaling": scaling}


def rotary_positions(raw, most):
    """Return (rope_theta, rope_scaling) of what config.json says; the scaling may be None.

    `transformers` 5 has both in "rope_parameters", older versions have two keys. `most` is the
    number of positions. Raises ValueError for a scaling that is not "llama3".
    """
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ValueError(f"rope_scaling is {found!r}; expected an object")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type is {kind!r}; expected 'default' or 'llama3'")
    numbers = {"rope_theta": raw.get("rope_theta") or LlamaConfig.rope_theta}
    if kind == "llama3":
        numbers |= dict.fromkeys(SCALING) | {SCALING[-1]: most}
    for key in found.keys() - {"rope_type", "type"}:
        if key not in numbers:
            raise ValueError(f"rope_scaling has {key}, which {kind!r} does not have")
        numbers[key] = found[key]
    for key, value in numbers.items():
        if type(value) not in (int, float) or value <= 0:
            raise ValueError(f"{key} of rope_scaling is {value!r}; expected a number above 0")
    theta = numbers.pop("rope_theta")
    return theta, {"rope_type": kind, **numbers} if numbers else None


@dataclass
class MistralConfig(LlamaConfig):
    """The same keys. `sliding_window` must be there and be null."""

    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    sliding_window: object = None

    assumed = {"sliding_window": 4096}
    supported = LlamaConfig.supported | {"attention_bias": (False,), "mlp_bias": (False,)}
    supported |= {"sliding_window": (None,)}


@dataclass
class Qwen2Config(LlamaConfig):
    """The same keys. Q, K and V always have biases, and O has none."""

    max_position_embeddings: int = 32768
    attention_bias: bool = True
    bos_token_id: object = None
    eos_token_id: object = None

    output_bias = False
    supported = LlamaConfig.supported | {"attention_bias": (True,), "mlp_bias": (False,)}
    supported |= {"use_sliding_window": (False,)}
