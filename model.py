"""BERT (Devlin et al., NAACL 2019, arXiv 1810.04805) by hand: post-LN, erf GELU, absolute positions.

- Every parameter bears the name Hugging Face gives it, so that loading and saving need no map.
- Two heads: the pooler with a classifier (plain fine-tuning), and the frozen label words of the MLM head (SMP).
- Only position 0 is read by either head, so the last layer computes only that position: exact, and 10/12 of its
  matrix products saved.
- Checkpoints are safetensors in Hugging Face's layout, in and out. Nothing here knows of pruning.

Axes: B examples, T tokens, C hidden size, H heads, D = C/H, F feed-forward size, V vocabulary, K outputs.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from data import UserError, atomic_write

DEMO = Path(__file__).parent / "demo"


@dataclass
class BertConfig:
    """The keys of Hugging Face's config.json that shape the network; the defaults are BERT-base's."""

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


# ---------------------------------------------------------------------------------------------------------------------
# the encoder; nn.ModuleDict where Hugging Face has a level of naming and the mathematics has none


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids):
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)  # (B, T, C)
        return self.dropout(self.LayerNorm(hidden + self.position_embeddings.weight[: input_ids.size(1)]))


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.heads, self.scale = config.num_attention_heads, (config.hidden_size // config.num_attention_heads) ** -0.5
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, hidden, readers, mask):
        """Positions `readers` (B, R, C) attend to all of `hidden` (B, T, C) where `mask` (B, 1, 1, T) is True."""
        projected = self.query(readers), self.key(hidden), self.value(hidden)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)  # (B, T, C) -> (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)  # (B, H, R, D)
        return mixed.transpose(1, 2).flatten(2)  # (B, R, C)


class Residual(nn.Module):
    """Post-LN: LayerNorm(residual + dropout(dense(x)))."""

    def __init__(self, config, inputs):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, residual):
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": Residual(config, config.hidden_size)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Residual(config, config.intermediate_size)

    def forward(self, hidden, mask, first_only=False):
        readers = hidden[:, :1] if first_only else hidden  # (B, R, C)
        readers = self.attention["output"](self.attention["self"](hidden, readers, mask), readers)
        return self.output(F.gelu(self.intermediate["dense"](readers)), readers)  # (B, R, F) -> (B, R, C)


class BertModel(nn.Module):
    def __init__(self, config, pooler):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        if pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def forward(self, input_ids, attention_mask, token_type_ids, first_only=False):
        """Hidden states (B, T, C) of the last layer, or of position 0 alone (B, 1, C); inputs are (B, T)."""
        hidden = self.embeddings(input_ids, token_type_ids)
        mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T), True where there is a token
        *body, last = self.encoder["layer"]
        for layer in body:
            hidden = layer(hidden, mask)
        return last(hidden, mask, first_only)


# ---------------------------------------------------------------------------------------------------------------------
# heads


class MLMHead(nn.Module):
    """Hugging Face's `cls.predictions`; its decoder is the word embedding matrix (tied)."""

    def __init__(self, config):
        super().__init__()
        dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform = nn.ModuleDict(
            {"dense": dense, "LayerNorm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)}
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden, embedding, ids=slice(None)):
        """Logits (..., len(ids)) of the words `ids` at the positions in `hidden` (..., C)."""
        hidden = self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden)))
        return F.linear(hidden, embedding[ids], self.bias[ids])  # (..., C) x (C, K) -> (..., K)


class Bert(nn.Module):
    """The encoder with a head: `head="classifier"` (pooler and a new linear layer) or `head="words"` (SMP, sec. 3).

    forward: (B, T) inputs -> (B, K) logits, float32 whatever autocast does. The head "words" adds no weight: it reads
    at position 0 the logits of the label words from the MLM head or, where there is none, h_[CLS] . e(word).
    """

    def __init__(self, config, head, outputs=0, words=(), pooler=True, mlm=True):
        super().__init__()
        self.config, self.head, self.outputs = config, head, outputs or len(words)
        self.bert = BertModel(config, pooler or head == "classifier")
        if mlm:
            self.cls = nn.ModuleDict({"predictions": MLMHead(config)})
        if head == "classifier":
            self.dropout = nn.Dropout(config.hidden_dropout_prob)
            self.classifier = nn.Linear(config.hidden_size, outputs)
        self.register_buffer("words", torch.tensor(words, dtype=torch.long), persistent=False)  # (K,)

    def forward(self, input_ids, attention_mask, token_type_ids):
        first = self.bert(input_ids, attention_mask, token_type_ids, first_only=True)[:, 0]  # (B, C)
        if self.head == "classifier":
            logits = self.classifier(self.dropout(torch.tanh(self.bert.pooler["dense"](first))))  # (B, K)
        elif hasattr(self, "cls"):
            logits = self.cls["predictions"](first, self.bert.embeddings.word_embeddings.weight, self.words)  # (B, K)
        else:
            logits = F.linear(first, self.bert.embeddings.word_embeddings.weight[self.words])  # (B, K)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def mlm_logits(self, input_ids, attention_mask, token_type_ids):
        """(B, T, V) logits of every word at every position: the pretraining task."""
        hidden = self.bert(input_ids, attention_mask, token_type_ids)
        return self.cls["predictions"](hidden, self.bert.embeddings.word_embeddings.weight)


def task_loss(logits, labels, low, high):
    """Loss of each example (B,), of K classes or of a score in [low, high].

    Classes (integer labels): cross-entropy. A score: squared error of one output or, of two outputs ("no", "yes"),
    cross-entropy against the soft target p(yes) = (score - low) / (high - low) (Gao et al. 2021, sec. 3.2).
    """
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels, reduction="none")
    if logits.size(1) == 1:
        return (logits[:, 0] - labels) ** 2
    yes = (labels - low) / (high - low)
    return F.cross_entropy(logits, torch.stack([1 - yes, yes], dim=1), reduction="none")  # (B, 2) against (B, 2)


def to_score(logits, low, high):
    """The score (B,) that one or two outputs (B, 1 or 2) of a regression task stand for; see `task_loss`."""
    return logits[:, 0] if logits.size(1) == 1 else low + (high - low) * logits.softmax(dim=1)[:, 1]


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def find_model(name):
    """The folder of `name`: "demo", a folder, or a Hugging Face id, which is downloaded into the hub's cache."""
    if name == "demo":
        return DEMO
    if Path(name).is_dir():
        return Path(name)
    import huggingface_hub as hub  # slow to import, and only needed here

    patterns = ["config.json", "*.safetensors", "model.safetensors.index.json", "vocab.txt", "tokenizer*.json"]
    wanted = {"allow_patterns": patterns, "ignore_patterns": "*/*"}
    try:
        hub.model_info(name, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)  # snapshot_download would wait without end
        folder = Path(hub.snapshot_download(name, **wanted))
    except Exception as error:  # the hub's many: no such id, no such network, gated, full disk
        try:
            folder = Path(hub.snapshot_download(name, **wanted, local_files_only=True))
        except Exception:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise UserError(
                f"--model {name}: no such folder, and the Hugging Face hub did not give it ({reason}); give a folder "
                "with config.json, model.safetensors and tokenizer.json, or `demo`"
            ) from None
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"--model {name}: the hub has no model.safetensors for it; {CONVERT.format(name=name)}")
    return folder


CONVERT = (
    "pickled .bin checkpoints are refused, since unpickling runs code; convert once, where transformers is installed: "
    'python -c "from transformers import AutoModelForMaskedLM as M; '
    "M.from_pretrained('{name}').save_pretrained('converted')\""
)


def read_json(path):
    """The object in a JSON file; UserError where it is missing or not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def read_config(folder):
    """BertConfig from folder/config.json; UserError where it is not a BERT this file can build."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    for key, value in wanted.items():
        if raw.get(key, value) != value:
            raise UserError(f"{path}: {key} is {raw[key]!r}; only {value!r} is supported")
    given = {}
    for field in fields(BertConfig):
        value = given[field.name] = raw.get(field.name, field.default)
        whole, most = field.type is int, 1 if field.name.endswith("prob") else 10**9
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 <= value <= most:
            kind = "whole number" if whole else "number"
            raise UserError(f"{path}: {field.name} is {value!r}; expected a {kind} from 0 to {most:,}")
    config = BertConfig(**given)
    if config.hidden_size < 1 or config.num_hidden_layers < 1 or config.num_attention_heads < 1:
        raise UserError(f"{path}: hidden_size, num_hidden_layers and num_attention_heads must be at least 1")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{path}: hidden_size {config.hidden_size} is no multiple of {config.num_attention_heads} attention heads"
        )
    return config


def read_safetensors(path):
    """({name: tensor}, metadata) of one safetensors file; UserError where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


def model_files(folder):
    """The safetensors files of a checkpoint, sharded or not; UserError where there are none."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        shards = read_json(index).get("weight_map")
        shards = list(shards.values()) if isinstance(shards, dict) else []
        if not shards or any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
            raise UserError(f"{index}: weight_map must name files of this folder")
        return [folder / shard for shard in sorted(set(shards))]
    if list(folder.glob("*.bin")):
        raise UserError(f"{folder}: no model.safetensors; {CONVERT.format(name=folder)}")
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def model_sha256(folder):
    """Hex digest over the weights of a checkpoint, shard after shard: which public weights a mask belongs to."""
    digest = hashlib.sha256()
    for path in model_files(folder):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_checkpoint(folder):
    """Every tensor of a checkpoint as float32, under Hugging Face's present names with the `bert.` prefix."""
    raw, tensors = {}, {}
    for path in model_files(folder):
        raw.update(read_safetensors(path)[0])
    for name, tensor in raw.items():
        if name.endswith("position_ids"):  # a buffer that old versions saved
            continue
        if name.endswith((".gamma", ".beta")):  # LayerNorm in checkpoints converted from TensorFlow
            name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        if name.split(".")[0] in ("embeddings", "encoder", "pooler"):  # saved from a bare BertModel
            name = "bert." + name
        tensors[name] = tensor.float()
    decoder = tensors.pop("cls.predictions.decoder.weight", None)
    embedding = tensors.get("bert.embeddings.word_embeddings.weight")
    if decoder is not None and embedding is not None and not torch.equal(decoder, embedding):
        raise UserError(
            f"{folder}: cls.predictions.decoder.weight {tuple(decoder.shape)} differs from "
            f"bert.embeddings.word_embeddings.weight {tuple(embedding.shape)}; only a tied decoder is supported"
        )
    bias = tensors.pop("cls.predictions.decoder.bias", None)  # the same tensor as cls.predictions.bias
    if bias is not None:
        tensors.setdefault("cls.predictions.bias", bias)
    return tensors


# What a checkpoint may hold beyond the model that is built from it ...
MAY_BE_EXTRA = ("bert.pooler.", "cls.predictions.", "cls.seq_relationship.", "classifier.")
# ... and what it may lack when a new head is put on it.
MAY_BE_ABSENT = ("bert.pooler.", "classifier.")


def load_model(folder, head, outputs=0, words=(), seed=0, dropout=None, new_head=True):
    """A `Bert` in float32 with the weights in `folder`; a new head is drawn from N(0, 0.02) with `seed`.

    `new_head=False` (a finished run): nothing may be absent. UserError names every tensor that is missing, left over or
    of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    tensors = read_checkpoint(folder)
    mlm = head == "words" and any(name.startswith("cls.predictions.") for name in tensors)
    pooler = not mlm and any(name.startswith("bert.pooler.") for name in tensors)  # BertForMaskedLM has none
    with torch.device("meta"):  # shapes only: nothing is drawn that the file then overwrites
        model = Bert(config, head, outputs, words, pooler, mlm)
    model.words = torch.tensor(words, dtype=torch.long)  # the one buffer that is in no file
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}

    absent = [n for n in wanted if n not in tensors and not (new_head and n.startswith(MAY_BE_ABSENT))]
    extra = [n for n in tensors if n not in wanted and not n.startswith(MAY_BE_EXTRA)]
    shapes = [
        f"{n} is {tuple(tensors[n].shape)}, expected {tuple(wanted[n])}"
        for n in wanted
        if n in tensors and tensors[n].shape != wanted[n]
    ]
    problems = [f"missing {', '.join(absent[:8])}"] * bool(absent) + [f"unknown {', '.join(extra[:8])}"] * bool(extra)
    if problems or shapes:
        raise UserError(f"{folder}: the tensors do not fit config.json: " + "; ".join(problems + shapes[:8]))

    generator = torch.Generator().manual_seed(seed)
    for name, shape in wanted.items():
        if name not in tensors:
            drawn = torch.zeros(shape)
            tensors[name] = drawn if name.endswith("bias") else drawn.normal_(0.0, 0.02, generator=generator)
    model.load_state_dict({name: tensors[name] for name in wanted}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


ARCHITECTURES = {("classifier", False): "BertForSequenceClassification", ("words", True): "BertForMaskedLM"}


def save_model(folder, model, state, source, labels, kind=None):
    """Write `state` (Hugging Face's names) as a folder that `transformers` loads, each file replaced atomically.

    `source` is the folder the model came from: its tokenizer files go along. `labels`: the class names, in order.
    `kind`: the class of `transformers`, if not the one that fits the head.
    """
    folder, source = Path(folder), Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    kind = kind or ARCHITECTURES.get((model.head, hasattr(model, "cls")), "BertModel")
    config = {"architectures": [kind], "model_type": "bert", "hidden_act": "gelu", **vars(model.config)}
    config["position_embedding_type"] = "absolute"
    if labels:
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    elif model.head == "classifier":
        config |= {"id2label": {0: "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    atomic_write(folder / "model.safetensors", to_safetensors(state, metadata={"format": "pt"}))
    atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for path in source.glob("*"):
        if path.name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            if path.resolve().parent != folder.resolve():
                atomic_write(folder / path.name, path.read_bytes())
