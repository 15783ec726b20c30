"""Checkpoints in Hugging Face's layout, in and out."""

from dataclasses import fields
from pathlib import Path

import torch

from model import BY_TANH, EXACT, Bert
from models.gpt2 import GPT2
from models.heads import arrange_head
from models.llama import Llama, Mistral, Qwen2
from models.roberta import Roberta
from prune import masked_linears
from support.fetch import model_files
from support.files import read_json, sha256_of, write_json
from support.matrices import in_float32
from support.tensors import read_safetensors, save_tensors
from support.terminal import UserError, quote, tell

# The class of each "model_type" of config.json.
ARCHITECTURES = {"bert": Bert, "roberta": Roberta, "gpt2": GPT2}
ARCHITECTURES |= {"llama": Llama, "mistral": Mistral, "qwen2": Qwen2}

# ---------- reading a checkpoint ------------------------------------------------------------------


def model_sha256(folder):
    """Return the hex digest of a checkpoint's weights, which tells to which a mask belongs.

    Where there are none, the random ones depend on config.json.
    """
    files = [Path(folder) / "config.json"] if is_without_weights(folder) else model_files(folder)
    return sha256_of(*files)


def is_without_weights(folder):
    """Does a folder describe a model that starts from random weights? It has none in any form."""
    Model, _ = read_config(folder)
    forms = ("*.safetensors*", "*.bin*", "*.h5", "*.msgpack", "*.pt", "*.pth", "*.ckpt*", "*.gguf")
    return hasattr(Model, "draw") and not any(any(Path(folder).glob(form)) for form in forms)


# What the keys of config.json may be, the value first that they have if they are not there.
SUPPORTED = {
    "model_type": tuple(ARCHITECTURES),
    "hidden_act": (*EXACT, *BY_TANH),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "quantization_config": (None,),
}


def read_config(folder):
    """Return (class of the model, its Config) from folder/config.json.

    Raises UserError if it is no model that we can build.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    try:
        Model = ARCHITECTURES.get(raw.get("model_type", "bert"), Bert)  # another one is refused
        return Model, config_of(Model, raw)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def config_of(Model, raw):
    """Return the Config of a class from what config.json says; ValueError if we cannot build it."""
    if hasattr(Model.Config, "in_one_form"):
        raw = Model.Config.in_one_form(raw)
    for key, supported in (SUPPORTED | getattr(Model.Config, "supported", {})).items():
        found = raw.get(key, supported[0])
        if found not in supported:
            expected = " or ".join(map(repr, supported))
            raise ValueError(f"{key} is {found!r}; expected {expected}")
    values = {}
    for key in ("pad_token_id", "n_inner"):
        if raw.get(key) is None:
            raw.pop(key, None)
    for field in fields(Model.Config):
        value = raw.get(field.name, field.default)
        if field.type in (str, object):  # one of SUPPORTED, or checked by its class
            values[field.name] = value
            continue
        most = 1 if field.name.endswith(DROPOUTS) else 10**12
        if type(value) not in (int, field.type) or not 0 <= value <= most:
            expected = f"expected {field.type.__name__} from 0 to {most:,}"
            raise ValueError(f"{field.name} is {value!r}; {expected}")
        values[field.name] = value
    config = Model.Config(**values)
    if min(config.hidden_size, config.num_hidden_layers, config.num_attention_heads) < 1:
        raise ValueError("hidden_size, num_hidden_layers, num_attention_heads are > 0")
    if config.hidden_size % config.num_attention_heads:
        heads = f"{config.num_attention_heads} attention heads"
        raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of {heads}")
    return config


DECODER = "cls.predictions.decoder.weight"
DROPOUTS = ("prob", "pdrop", "dropout")  # how the names of probabilities of dropout end


def read_checkpoint(folder):
    """Return {name: tensor} of a checkpoint in float32, under our names.

    These are Hugging Face's names of today or, for RoBERTa, those that BERT would have.
    """
    Model, config = read_config(folder)
    found = {}
    for path in model_files(folder):
        found |= {name: tensor.float() for name, tensor in read_safetensors(path)[0].items()}
    if hasattr(Model, "from_hub"):
        try:
            return Model.from_hub(found, config)
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from None
    tensors = {}
    for name, tensor in found.items():
        if name.endswith("position_ids"):  # a buffer that old versions saved
            continue
        if name.endswith((".gamma", ".beta")):  # LayerNorm in checkpoints from TensorFlow
            name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        if name.startswith(("embeddings.", "encoder.", "pooler.")):  # from a bare BertModel
            name = f"{Model.hub_prefix}.{name}"
        tensors[our_name(name, Model.hub_names)] = tensor
    decoder = tensors.get(DECODER)
    embedding = tensors.get("bert.embeddings.word_embeddings.weight")
    if decoder is not None and embedding is not None and torch.equal(decoder, embedding):
        del tensors[DECODER]  # it is tied, as in our models
    bias = tensors.pop("cls.predictions.decoder.bias", None)  # the same as cls.predictions.bias
    if bias is not None:
        tensors.setdefault("cls.predictions.bias", bias)
    return tensors


def our_name(name, hub_names):
    for theirs, ours in hub_names.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


# What a checkpoint often holds that the model does not have. The rest is named.
MAY_BE_EXTRA = ("bert.pooler.", "cls.", "classifier.", "qa_outputs.")
# What it may lack when the model gets a new output head.
MAY_BE_ABSENT = ("bert.pooler.", "classifier.", "qa_outputs.")


def load_model(
    folder,
    output_head,
    outputs=0,
    words=(),
    seed=0,
    dropout=None,
    new_head=True,
    form="pooled",
    labels=(),
):
    """Return a model in float32 with the weights in `folder`, and an output head of this `form`.

    `labels` are the names of the outputs, in order. The output head of the folder is taken where it
    is for these labels, see `arrange_head`. Else a new one is drawn from N(0, 0.02) with `seed`.
    With `new_head=False` nothing may be absent; without `labels` the outputs are in the order that
    the model needs (a finished run). Raises UserError that names the tensors which are missing,
    left over or of another shape.
    """
    Model, config = read_config(folder)
    if not all(0 <= word < config.vocab_size for word in words):
        raise UserError(f"{folder}: has no words {words}; its vocabulary has {config.vocab_size}")
    check_form(folder, Model, form)
    for name in vars(config):
        if dropout is not None and name.endswith(DROPOUTS):
            setattr(config, name, dropout)
    tensors = {} if is_without_weights(folder) else read_checkpoint(folder)
    mlm = output_head == "words" and holds(tensors, "cls.predictions.")
    if mlm and DECODER in tensors:
        expected = "the word embeddings, to which the MLM head is tied"
        raise UserError(f"{folder}: {DECODER} differs from {expected}; label words cannot use it")
    if output_head == "classifier" and labels:
        name, _ = Model.heads[form]
        per_token = form == "pooled" and not holds(tensors, "bert.pooler.")
        arrange_head(folder, tensors, name, labels, new_head, per_token)
    # BertForMaskedLM has no pooler, and heads of every token read none
    pooler = not mlm and form == "pooled" and holds(tensors, "bert.pooler.")
    with torch.device("meta"):  # only shapes: the values come from the file
        model = Model(config, output_head, outputs, words, pooler, mlm, form)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if not tensors and not new_head:
        raise UserError(f"{folder}: no weights; expected a trained model")
    if not tensors:
        tell(f"{folder}: no weights; the model starts from random ones")
        tensors = Model.draw(shapes, seed)
    check_tensors(folder, Model, tensors, shapes, MAY_BE_ABSENT if new_head else ())

    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if name not in tensors:
            tensors[name] = torch.zeros(shape)
            if not name.endswith("bias"):
                tensors[name].normal_(0.0, 0.02, generator=generator)
    model.load_state_dict({name: tensors[name] for name in shapes}, assign=True)
    model.requires_grad_(True)
    if output_head == "words" and pooler:
        model.bert.pooler.requires_grad_(False)  # it is kept, but nothing reads it
    return model


def check_form(folder, Model, form):
    """Raise UserError where the models of a class have no output head of this form."""
    if form not in Model.heads:
        able = [name for name, other in ARCHITECTURES.items() if form in other.heads]
        expected = f"expected {' or '.join(able)}, because of the kind of the task"
        raise UserError(f"{folder}/config.json: model_type is {type_of(Model)}; {expected}")


def holds(tensors, prefix):
    """Does one of the names in `tensors` begin with `prefix`?"""
    return any(name.startswith(prefix) for name in tensors)


def check_tensors(folder, Model, tensors, shapes, may_be_absent):
    """Raise UserError unless `tensors` fit the model's `shapes` {name: shape}.

    A line names those outside the encoder that the model does not have.
    """
    absent = [n for n in shapes if n not in tensors and not n.startswith(may_be_absent)]
    rest = [n for n in tensors if n not in shapes]
    unusual = [n for n in rest if n == DECODER or not n.startswith(MAY_BE_EXTRA)]
    extra = [n for n in unusual if n.startswith(Model.inner)]  # it computes something else
    unused = [n for n in unusual if n not in extra]
    if unused:
        tell(f"{folder}: not used: {quote(', '.join(unused))}")
    problems = []
    if absent:
        problems.append(f"missing {', '.join(absent[:8])}")
    if extra:
        problems.append(f"unknown {', '.join(extra[:8])}")
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}")
    if problems:
        raise UserError(f"{folder}: tensors do not fit config.json: {'; '.join(problems[:8])}")


# ---------- writing a checkpoint ------------------------------------------------------------------


@torch.no_grad()
def baked_state(model):
    """Return the state dict with the masks applied, without scores: what any BERT can load."""
    state = {name: in_float32(tensor) for name, tensor in model.state_dict().items()}
    training = model.training
    model.eval()
    for name, module in masked_linears(model).items():
        masked = in_float32(module.masked_weight())
        state[f"{name}.weight"] = masked + 0.0  # -0.0 becomes 0.0
        state.pop(f"{name}.scores", None)
    model.train(training)
    return state


def config_values(model):
    """Return what config.json says of the network."""
    return {**vars(model.config), "model_type": type_of(type(model))}


def type_of(Model):
    """Return the "model_type" of a class."""
    (name,) = [name for name, other in ARCHITECTURES.items() if other is Model]
    return name


def from_config_values(values):
    """Return (class of the model, its Config): the reverse of `config_values`."""
    values = dict(values)
    Model = ARCHITECTURES[values.pop("model_type", "bert")]
    return Model, Model.Config(**values)


def save_model(folder, model, state, labels, hub_class=None):
    """Write a folder that transformers loads, but for the tokenizer (see `save_tokenizer`).

    Each file is replaced atomically. `state`: {name: tensor} under our names. `labels`: the names
    of the classes, in order. `hub_class`: the class of transformers, if it is not the one that fits
    the output head.
    """
    folder = Path(folder)
    config = {
        "architectures": [hub_class or model.hub_class],
        **config_values(model),
    }
    if isinstance(model, Bert):
        config["position_embedding_type"] = "absolute"
    if not labels and model.output_head == "classifier":
        labels = ("score",)
        config["problem_type"] = "regression"
    if labels:
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    save_tensors(folder / "model.safetensors", model.to_hub(state), format="pt")
    write_json(folder / "config.json", config)
