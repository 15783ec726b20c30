"""BERT by hand (Devlin et al., NAACL 2019, arXiv 1810.04805), and the device it computes on.

- Every parameter has the name that Hugging Face gives it. Loading and saving need no map of names.
- There are two output heads: a new linear layer (plain fine-tuning), and the label words of the
  frozen MLM head (SMP).
- Where the task's kind reads position 0 alone, the last layer computes only that position, which is
  exact. It saves 10/12 of the layer's products: K and V remain, each 1/12 of them.
- Checkpoints are safetensors in Hugging Face's layout, in and out.

Nothing here knows of pruning. What a pruner may ask of a model stands at the end of class `Bert`.

Axes: B examples, T tokens, R positions with a query, C hidden size, H attention heads, D = C/H,
F feed-forward size, V vocabulary, K outputs.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import nn

from data import EVERY_POSITION, IGNORED
from tools.common import atomic_write, read_json, read_safetensors, require, sha256_of, write_json
from tools.fetch import model_files

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
    model_type: str = "bert"  # or "roberta"

    @property
    def first_position(self):
        """Return the row of the first token's position. RoBERTa counts from its padding id + 1."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def positions(self):
        """Return the number of tokens that a text can have."""
        return self.max_position_embeddings - self.first_position


# -------------------------------------------------------------------------------------------------
# the encoder
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
        self.first_position = config.first_position

    def forward(self, input_ids, token_type_ids):
        hidden = self.word_embeddings(input_ids)  # (B, T, C)
        hidden = hidden + self.token_type_embeddings(token_type_ids)
        positions = self.position_embeddings.weight[self.first_position :]
        hidden = hidden + positions[: input_ids.size(1)]
        return self.dropout(self.LayerNorm(hidden))


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

    def forward(self, hidden, mask, first_only=False):
        queries = hidden[:, :1] if first_only else hidden  # (B, R, C)
        attended = self.attention["self"](hidden, queries, mask)
        attended = self.attention["output"](attended, queries)
        inner = F.gelu(self.intermediate["dense"](attended))  # (B, R, C) -> (B, R, F)
        return self.output(inner, attended)  # (B, R, F) -> (B, R, C)


class BertModel(nn.Module):
    """The embeddings and the layers."""

    def __init__(self, config, pooler):
        super().__init__()
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.embeddings = Embeddings(config)
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


# -------------------------------------------------------------------------------------------------
# output heads


class MLMHead(nn.Module):
    """Hugging Face's `cls.predictions`. Its decoder is the word embedding matrix (tied)."""

    def __init__(self, config):
        super().__init__()
        dense = nn.Linear(config.hidden_size, config.hidden_size)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden, embedding, ids=slice(None)):
        """Return the logits (..., K) of the words `ids` (default: all) for `hidden` (..., C)."""
        hidden = self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden)))
        return F.linear(hidden, embedding[ids], self.bias[ids])  # (..., C) x (C, K) -> (..., K)


# The trained output head by the kind of the task: the name of its linear layer, and the class of
# transformers that has it.
HEADS = {
    "classify": ("classifier", "BertForSequenceClassification"),
    "score": ("classifier", "BertForSequenceClassification"),
    "span": ("qa_outputs", "BertForQuestionAnswering"),
    "tag": ("classifier", "BertForTokenClassification"),
}


class Bert(nn.Module):
    """The encoder with an output head. Inputs are (B, T).

    The result is logits in float32: (B, K) at position 0 or, for the kinds "span" and "tag",
    (B, T, K) at every position.

    `output_head="classifier"`: a new linear layer. The kinds that read position 0 have the pooler
    before it.
    `output_head="words"` (SMP, section 3): no new weight. The logit of a class is that of its label
    word in the MLM head. Where a model has no MLM head, it is h . e(word).
    """

    def __init__(
        self, config, output_head, outputs=0, words=(), pooler=True, mlm=True, kind="classify"
    ):
        super().__init__()
        self.config = config
        self.output_head = output_head
        self.outputs = len(words) or outputs
        self.kind = kind
        self.bert = BertModel(config, pooler or (output_head == "classifier" and self.first_only))
        if mlm:
            self.cls = nn.ModuleDict({"predictions": MLMHead(config)})
        if output_head == "classifier":
            # transformers has no dropout before `qa_outputs`
            self.dropout = nn.Dropout(0.0 if kind == "span" else config.hidden_dropout_prob)
            name, _ = HEADS[kind]
            self.add_module(name, nn.Linear(config.hidden_size, outputs))
        words = torch.tensor(words, dtype=torch.long, device="cpu")  # (K,) ids of label words
        self.register_buffer("words", words, persistent=False)

    @property
    def first_only(self):
        return self.kind not in EVERY_POSITION

    def forward(self, input_ids, attention_mask, token_type_ids):
        first_only = self.first_only
        hidden = self.bert(input_ids, attention_mask, token_type_ids, first_only)  # (B, R, C)
        if first_only:
            hidden = hidden[:, 0]  # (B, 1, C) -> (B, C)
        embedding = self.bert.embeddings.word_embeddings.weight  # (V, C)
        if self.output_head == "classifier":
            if first_only:
                if self.config.model_type == "roberta":
                    hidden = self.dropout(hidden)
                hidden = torch.tanh(self.bert.pooler["dense"](hidden))
            name, _ = HEADS[self.kind]
            logits = self.get_submodule(name)(self.dropout(hidden))  # (..., C) -> (..., K)
        elif hasattr(self, "cls"):
            logits = self.cls["predictions"](hidden, embedding, self.words)  # (..., K)
        else:
            logits = F.linear(hidden, embedding[self.words])  # (..., C) x (C, K) -> (..., K)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def mlm_logits(self, input_ids, attention_mask, token_type_ids):
        """Return the logits (B, T, V) of every word at every position, as in pretraining."""
        hidden = self.bert(input_ids, attention_mask, token_type_ids)
        return self.cls["predictions"](hidden, self.bert.embeddings.word_embeddings.weight)

    # What a pruner may ask of a model. Another architecture offers the same four.

    matrices = MATRICES  # the six matrices of a layer: letter -> name

    @property
    def layers(self):
        return self.bert.encoder["layer"]

    @property
    def embeddings(self):
        return self.bert.embeddings

    @property
    def num_heads(self):
        return self.config.num_attention_heads


FORBIDDEN = -1e4  # the logit of what cannot be chosen; its probability is exactly 0


def decisions(kind, logits, attention_mask):
    """Return the logits of decisions among C choices, (..., C), and their largest entropies.

    kind              logits       decisions    choices
    classify, score   (B, K)       (B, K)       K
    span              (B, T, 2)    (B, 2, T)    the tokens, not the padding
    tag               (B, T, K)    (B, T, K)    K

    `attention_mask` is (B, T). The largest entropy of a decision is log(number of its choices).
    """
    if kind != "span":
        return logits, math.log(logits.size(-1))
    table = logits.transpose(1, 2)  # (B, T, 2) -> (B, 2, T)
    table = table.masked_fill(~attention_mask[:, None], FORBIDDEN)
    return table, attention_mask.sum(1, keepdim=True).log()  # (B, 1)


def task_loss(logits, labels, low, high):
    """Return the loss of each decision, shaped as `labels`, from logits (..., C); see `decisions`.

    Classes (integer labels): cross-entropy; 0 where the label is IGNORED.
    A value from `low` to `high`, one output: squared error.
    A value from `low` to `high`, two outputs ("no", "yes"): cross-entropy against the soft target
    p(yes) = (value - low) / (high - low) (Gao et al. 2021, section 3.2).
    """
    if not labels.is_floating_point():
        flat = logits.flatten(0, -2)  # (..., C) -> (decisions, C)
        losses = F.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=IGNORED)
        return losses.view_as(labels)
    if logits.size(1) == 1:
        return (logits[:, 0] - labels) ** 2
    yes = (labels - low) / (high - low)
    target = torch.stack([1 - yes, yes], dim=1)  # (B, 2)
    return F.cross_entropy(logits, target, reduction="none")


def to_value(logits, low, high):
    """Return the value (B,) that one or two outputs of a regression stand for; see `task_loss`."""
    if logits.size(1) == 1:
        return logits[:, 0]
    return low + (high - low) * logits.softmax(dim=1)[:, 1]


# -------------------------------------------------------------------------------------------------
# device and dtype


def send(tensor, device):
    """Return the tensor on the device.

    A copy to CUDA starts from pinned memory and waits for nothing. No step reads anything back, so
    the next batch is made and sent while the device computes.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def inputs(batch, device):
    """Return the three inputs of the model, (B, T) each, on the device."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: send(batch[name], device) for name in names}


# -------------------------------------------------------------------------------------------------
# checkpoints: reading them


def model_sha256(folder):
    """Return the hex digest of a checkpoint's weights, which tells to which a mask belongs."""
    return sha256_of(*model_files(folder))


# The values that this file can build, the first one by default.
SUPPORTED = {
    "model_type": ("bert", "roberta"),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
}


def read_config(folder):
    """Return BertConfig from folder/config.json; UserError if it is no BERT this file can build."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    for key, supported in SUPPORTED.items():
        found = raw.get(key, supported[0])
        expected = " or ".join(map(repr, supported))
        require(found in supported, f"{path}: {key} is {found!r}; expected {expected}")
    values = {"model_type": raw.get("model_type", "bert")}
    for field in fields(BertConfig)[:-1]:  # the last one is no number
        value = raw.get(field.name, field.default)
        most = 1 if field.name.endswith("prob") else 10**9
        valid = type(value) in (int, field.type) and 0 <= value <= most
        expected = f"expected {field.type.__name__} from 0 to {most:,}"
        require(valid, f"{path}: {field.name} is {value!r}; {expected}")
        values[field.name] = value
    config = BertConfig(**values)
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    require(min(sizes) > 0, f"{path}: hidden_size, num_hidden_layers, num_attention_heads are > 0")
    whole = config.hidden_size % config.num_attention_heads == 0
    heads = f"{config.num_attention_heads} attention heads"
    require(whole, f"{path}: hidden_size {config.hidden_size} is not a multiple of {heads}")
    return config


# RoBERTa's names, and ours, which are BERT's. RoBERTa's own pooler is not used.
ROBERTA = {
    "roberta.pooler.": "cls.unused.",
    "classifier.dense.": "bert.pooler.dense.",
    "classifier.out_proj.": "classifier.",
    "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "lm_head.": "cls.predictions.",
    "roberta.": "bert.",
}


def read_checkpoint(folder):
    """Return {name: tensor} of a checkpoint in float32, under Hugging Face's names of today."""
    tensors = {}
    model_type = read_config(folder).model_type
    for path in model_files(folder):
        for name, tensor in read_safetensors(path)[0].items():
            if name.endswith("position_ids"):  # a buffer that old versions saved
                continue
            if name.endswith((".gamma", ".beta")):  # LayerNorm in checkpoints from TensorFlow
                name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
            if name.startswith(("embeddings.", "encoder.", "pooler.")):  # from a bare BertModel
                name = f"{model_type}.{name}"
            for theirs, ours in ROBERTA.items():
                name = name.replace(theirs, ours) if name.startswith(theirs) else name
            tensors[name] = tensor.float()
    decoder = tensors.pop("cls.predictions.decoder.weight", None)
    embedding = tensors.get("bert.embeddings.word_embeddings.weight")
    if decoder is not None and embedding is not None:
        message = "cls.predictions.decoder.weight differs from the word embeddings, it is not tied"
        require(torch.equal(decoder, embedding), f"{folder}: {message}")
    bias = tensors.pop("cls.predictions.decoder.bias", None)  # the same as cls.predictions.bias
    if bias is not None:
        tensors.setdefault("cls.predictions.bias", bias)
    return tensors


# What a checkpoint may hold that the model does not have ...
MAY_BE_EXTRA = ("bert.pooler.", "cls.", "classifier.", "qa_outputs.")
# ... and what it may lack when the model gets a new output head.
MAY_BE_ABSENT = ("bert.pooler.", "classifier.", "qa_outputs.")


def load_model(
    folder, output_head, outputs=0, words=(), seed=0, dropout=None, new_head=True, kind="classify"
):
    """Return a `Bert` in float32 with the weights in `folder`, for a task of this kind.

    A new output head is drawn from N(0, 0.02) with `seed`. With `new_head=False` (a finished run)
    nothing may be absent. Raises UserError that names the tensors which are missing, left over or
    of another shape.
    """
    config = read_config(folder)
    known = all(0 <= word < config.vocab_size for word in words)
    require(known, f"{folder}: has no words {words}; its vocabulary has {config.vocab_size}")
    if dropout is not None:
        config.hidden_dropout_prob = dropout
        config.attention_probs_dropout_prob = dropout
    tensors = read_checkpoint(folder)
    mlm = output_head == "words" and holds(tensors, "cls.predictions.")
    pooler = not mlm and holds(tensors, "bert.pooler.")  # BertForMaskedLM has none
    pooler = pooler and kind not in EVERY_POSITION
    with torch.device("meta"):  # only shapes: the values come from the file
        model = Bert(config, output_head, outputs, words, pooler, mlm, kind)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_tensors(folder, tensors, shapes, MAY_BE_ABSENT if new_head else ())

    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if name not in tensors:
            tensors[name] = torch.zeros(shape)
            if not name.endswith("bias"):
                tensors[name].normal_(0.0, 0.02, generator=generator)
    model.load_state_dict({name: tensors[name] for name in shapes}, assign=True)
    return model.requires_grad_(True)


def holds(tensors, prefix):
    """Does one of the names in `tensors` begin with `prefix`?"""
    return any(name.startswith(prefix) for name in tensors)


def check_tensors(folder, tensors, shapes, may_be_absent):
    """Raise UserError unless `tensors` fit the model's `shapes` {name: shape}."""
    absent = [n for n in shapes if n not in tensors and not n.startswith(may_be_absent)]
    extra = [n for n in tensors if n not in shapes and not n.startswith(MAY_BE_EXTRA)]
    problems = []
    if absent:
        problems.append(f"missing {', '.join(absent[:8])}")
    if extra:
        problems.append(f"unknown {', '.join(extra[:8])}")
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}")
    require(not problems, f"{folder}: tensors do not fit config.json: {'; '.join(problems[:8])}")


# -------------------------------------------------------------------------------------------------
# checkpoints: writing them

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


def save_model(folder, model, state, source, labels, kind=None):
    """Write a folder that transformers loads. Each file is replaced atomically.

    `state`: {name: tensor} under Hugging Face's names. `source`: the folder the model came from,
    whose tokenizer files go along. `labels`: the names of the classes, in order. `kind`: the class
    of transformers, if it is not the one that fits the output head.
    """
    folder = Path(folder)
    if kind is None:
        kind = "BertForMaskedLM" if hasattr(model, "cls") else "BertModel"
        if model.output_head == "classifier":
            _, kind = HEADS[model.kind]
    config = {
        "architectures": [kind],
        "hidden_act": "gelu",
        **vars(model.config),
        "position_embedding_type": "absolute",
    }
    if not labels and model.output_head == "classifier":
        labels = ("score",)
        config["problem_type"] = "regression"
    if labels:
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    if model.config.model_type == "roberta":
        config["architectures"] = [kind.replace("Bert", "Roberta")]
        state = roberta_names(state)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    atomic_write(folder / "model.safetensors", to_safetensors(state, metadata={"format": "pt"}))
    write_json(folder / "config.json", config)
    if Path(source).resolve() != folder.resolve():
        for name in TOKENIZER_FILES:
            path = Path(source) / name
            if path.exists():
                atomic_write(folder / name, path.read_bytes())


def roberta_names(state):
    """Return a state dict under RoBERTa's names. With a pooler, the classifier has two layers."""
    has_pooler = holds(state, "bert.pooler.")
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in ROBERTA.items():
            if name.startswith(ours) and (has_pooler or ours != "classifier."):
                name = theirs + name.removeprefix(ours)
                break
        renamed[name] = tensor
    return renamed
