"""Export, shrink or pack a finished run.

    python -m tools.deploy RUN --export DIR      a folder that `transformers` loads by itself
    python -m tools.deploy RUN --compact DIR     the same function with fewer weights
    python -m tools.deploy RUN --sparse          its metrics and speed with CSR matrices on a CPU
    python -m tools.deploy RUN --save-mask FILE  an SMP run as one small file, a mask

Existing files are overwritten only with --force. Use a folder of --compact:

    python -m tools.deploy DIR --evaluate            its metrics on dev
    python -m tools.deploy DIR --predictions FILE    a split's predictions

Evaluate mask files. One base model in memory serves all of them:

    python -m tools.deploy --model BASE --mask FILE --mask FILE

Evaluate a mask that was released with the SMP paper:

    python -m tools.deploy --model BASE --mask MNLI.npy --task mnli --words maybe no yes
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once
    print("loading torch", file=sys.stderr)  # this takes a second or two

import copy
import json
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as torch_to_safetensors
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from data import collate, load_tokenizer
from eval import evaluate, load_dev, load_run, measure, predict, show, to_predictions, trained_on
from eval import write_predictions
from model import HEADS, Bert, BertConfig, holds, inputs, save_model
from prune import encoder_matrices
from tools.common import Parser, UserError, as_flag, atomic_write, autocast, is_stream, number
from tools.common import pick_device, program, read_json, read_safetensors, require
from tools.masks import evaluate_masks, save_mask
from tools.timing import alternate

CPU = torch.device("cpu")

# -------------------------------------------------------------------------------------------------
# where to write


def make_room(target, run, force):
    """Raise UserError where writing `target` would destroy something.

    That is a file, or a folder that is not empty. `force` permits both, but nothing permits to
    write into a run.
    """
    target = Path(target)
    inside = target.resolve().is_relative_to(Path(run).resolve())
    require(not inside, f"{target}: belongs to the run; name another place")
    a_run = (target / "metrics.jsonl").exists()
    require(not a_run, f"{target}: is a run; name another place")
    taken = target.exists() and not is_stream(target)
    if target.is_dir():
        taken = any(target.iterdir())
    require(force or not taken, f"{target}: exists already; name another, or give --force")


# -------------------------------------------------------------------------------------------------
# export


def export(run, folder, which):
    """Write a run's model, with its masks applied, as a folder for `transformers`.

    The class that computes the same function depends on the output head:
    - A trained head: BertForSequenceClassification, BertForQuestionAnswering ("span") or
      BertForTokenClassification ("tag").
    - Label words by the whole MLM head: BertForMaskedLM. Its logits are read at the label words,
      which its config.json names in `label_words`.
    - Label words alone: BertForTokenClassification or ("span") BertForQuestionAnswering. The rows
      of its linear layer are the embeddings of the words.
    The kinds "classify" and "score" read them at position 0, the others at every position.
    """
    model, task, _, _ = load_run(run, which)
    write_export(folder, model, task, Path(run) / which)


def write_export(folder, model, task, source):
    """Write the folder for `model`. `source` is the folder that has its tokenizer's files."""
    folder = Path(folder)
    state = model.state_dict()
    labels = task.labels
    kind = None  # the class that fits the output head
    if model.output_head == "words" and not hasattr(model, "cls"):
        layer, kind = HEADS["span" if task.kind == "span" else "tag"]
        rows = model.embeddings.word_embeddings.weight[model.words]  # (K, C)
        state = {name: t for name, t in state.items() if not name.startswith("bert.pooler.")}
        state[f"{layer}.weight"] = rows
        state[f"{layer}.bias"] = torch.zeros(len(rows))
        labels = labels or task.words[-len(rows) :]
    save_model(folder, model, state, source, labels, kind)
    config = read_json(folder / "config.json")
    kind = config["architectures"][0]
    if kind.endswith("ForMaskedLM"):
        config["label_words"] = task.words[-model.outputs :]
        config["label_word_ids"] = model.words.tolist()
        atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    print(f"{folder}: {kind}, for transformers.AutoModel{kind[kind.find('For') :]}")


# -------------------------------------------------------------------------------------------------
# the matrices of a model


def encoder_linears(model):
    """Return the six linear layers of every layer in one list, whatever their sizes."""
    linears = []
    for column in encoder_matrices(model).values():
        linears += column
    return linears


def count_weights(model):
    """Return the number of weights in the encoder's matrices."""
    return sum(linear.weight.numel() for linear in encoder_linears(model))


def matrix_names(model):
    """Return {letter: name of that matrix in the state dict} for each layer."""
    name_of = {module: name for name, module in model.named_modules()}
    names = []
    for layer in model.layers:
        prefix = name_of[layer]
        names.append({letter: f"{prefix}.{name}" for letter, name in model.matrices.items()})
    return names


# -------------------------------------------------------------------------------------------------
# exact compaction
#
# What a mask makes constant or unread is folded away, and the function stays the same. What may be
# folded depends on how the matrices of a layer are connected, so this part, like SparseLayer below,
# knows the inside of a BERT layer.


def linear_of(weight, bias):
    """Return an nn.Linear with these values, in float32 and not trainable."""
    linear = nn.Linear(1, 1, device="meta")  # with its own sizes it would warn of an empty matrix
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.float())
    linear.bias = nn.Parameter(bias.float())
    return linear.requires_grad_(False)


def compact_feed_forward(up, down):
    """Return (U, D) without the units that are constant or unread.

    A unit with an empty row of U is constant: it is GELU of its bias, which goes into the bias of
    D. A unit with an empty column of D is unread.
    """
    weight = down.weight.double()  # (C, F)
    constant = ~up.weight.any(1)  # (F,)
    unread = ~down.weight.any(0)  # (F,)
    values = F.gelu(up.bias.double()[constant])
    bias = down.bias.double() + weight[:, constant] @ values  # (C, n) x (n,) -> (C,)
    keep = ~constant & ~unread
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


def compact_attention(attention):
    """Compact the Q, K, V and O of a layer in place.

    Return the number of query dimensions of each head, and that of value dimensions.
    """
    inner = attention["self"]
    q = in_float64(inner.query)
    k = in_float64(inner.key)
    v = in_float64(inner.value)
    o = in_float64(attention["output"].dense)
    bias = o.bias
    heads = []
    for rows in torch.arange(q.out_features).chunk(inner.num_heads):  # (D,)
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
    inner.query = linear_of(padded["q"], padded["q_bias"])
    inner.key = linear_of(padded["k"], padded["k_bias"])
    inner.value = linear_of(padded["v"], padded["v_bias"])
    inner.num_heads = len(heads)  # its scale stays that of the original head size
    attention["output"].dense = linear_of(padded["o"].T.contiguous(), bias)
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


def pad_units(layer, units):
    """Add units of zeros to a layer until it has `units` of them."""
    up = layer.intermediate["dense"]
    down = layer.output.dense
    more = units - up.out_features
    layer.intermediate["dense"] = linear_of(
        F.pad(up.weight, (0, 0, 0, more)),  # (n, C) -> (F, C)
        F.pad(up.bias, (0, more)),
    )
    layer.output.dense = linear_of(F.pad(down.weight, (0, more)), down.bias)  # (C, n) -> (C, F)


@torch.no_grad()
def compact(model, uniform=False, drop_rows=0):
    """Compact a model in place, for evaluation. Its function stays, with fewer weights.

    Return [query dimensions of each head, value dimensions of each head, units] of each layer.
    `uniform`: only units of the feed-forward part are removed, the same number in every layer,
    because the classes of `transformers` can hold no more. `drop_rows`: rows with fewer weights
    are emptied first, which changes the function.
    """
    for linear in encoder_linears(model):
        thin = linear.weight.count_nonzero(dim=1) < drop_rows  # (out,)
        linear.weight[thin] = 0.0
    sizes = []
    for layer in model.layers:
        up, down = compact_feed_forward(layer.intermediate["dense"], layer.output.dense)
        layer.intermediate["dense"] = up
        layer.output.dense = down
        heads = ([], [])  # the query and the value dimensions of each head; uniform: not said
        if not uniform:
            heads = compact_attention(layer.attention)
        sizes.append([*heads, up.out_features])
    if uniform:
        most = max(units for _, _, units in sizes)
        model.config.intermediate_size = max(most, 1)
        for layer in model.layers:
            pad_units(layer, model.config.intermediate_size)
    return sizes


# -------------------------------------------------------------------------------------------------
# the compact folder
#
# compact.safetensors holds the state dict without the zeros that pad heads, compact.json what is
# needed to build the model, tokenizer.json the tokenizer.


def change_heads(state, names, sizes, change):
    """Replace in a state dict whatever is divided into heads by change(tensor, sizes of the heads).

    These are the rows of Q, K and V, and the columns of O. `names`: see `matrix_names`.
    """
    for name_of, (query_sizes, value_sizes, _) in zip(names, sizes, strict=True):
        for letter, of_heads in (("Q", query_sizes), ("K", query_sizes), ("V", value_sizes)):
            for kind in ("weight", "bias"):
                name = f"{name_of[letter]}.{kind}"
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


def write_compact(folder, model, task, tokenizer, settings, config, sizes):
    """Write a compacted model as a folder in our own layout.

    The classes of `transformers` cannot hold heads of different sizes. `config` is that of the
    whole model.
    """
    folder = Path(folder)
    state = model.state_dict()
    change_heads(state, matrix_names(model), sizes, drop_padding)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    about = {
        "task": settings["task"],
        "task_file": settings["task_file"],
        "max_length": settings["max_length"],
        "dtype": settings["dtype"],
        "head": model.output_head,
        "kind": model.kind,
        "config": vars(config),
        "outputs": model.outputs,
        "words": model.words.tolist(),
        "labels": list(task.labels),
        "sizes": sizes,
    }
    atomic_write(folder / "compact.safetensors", torch_to_safetensors(state))
    atomic_write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    atomic_write(folder / "compact.json", json.dumps(about) + "\n")


def load_compact(folder):
    """Return (model, what compact.json says) of a folder that --compact wrote.

    Raises UserError where it is damaged.
    """
    about = read_json(Path(folder) / "compact.json")
    state, _ = read_safetensors(Path(folder) / "compact.safetensors")
    try:
        model = build_compact(about, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not a whole compact model ({reason}); write it again") from None
    return model, about


def build_compact(about, state):
    """Return the model of a compact folder, from its JSON and its state dict, which is changed."""
    config = BertConfig(**about["config"])
    pooler = holds(state, "bert.pooler.")
    mlm = holds(state, "cls.predictions.")
    with torch.device("meta"):  # only the structure: values and sizes come from the file
        head = (about["head"], about["outputs"], about["words"])
        kind = about.get("kind", "classify")  # older folders do not say it
        if kind not in list(HEADS):
            raise ValueError(f"kind is {kind!r}")
        model = Bert(config, *head, pooler, mlm, kind)
    model.words = torch.tensor(about["words"], dtype=torch.long)
    names = matrix_names(model)
    change_heads(state, names, about["sizes"], add_padding)
    for i, layer in enumerate(model.layers):
        query_sizes, _, units = about["sizes"][i]
        layer.attention["self"].num_heads = len(query_sizes)
        for name in names[i].values():
            linear = model.get_submodule(name)
            linear.weight = nn.Parameter(state[f"{name}.weight"])
            linear.bias = nn.Parameter(state[f"{name}.bias"])
        if len(layer.intermediate["dense"].weight) != units:
            raise ValueError(f"layer {i} has other than {units} units")
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_compact(run, folder, which, drop_rows, uniform, device, data_dir, check=True):
    """Write a run's model compacted, and print what that saves and, with `check`, changes.

    The layout of the folder is ours, or with `uniform` that of `transformers`.
    """
    model, task, tokenizer, s = load_run(run, which)
    total = count_weights(model)
    config = copy.copy(model.config)  # of the whole model
    sizes = compact(model, uniform, drop_rows)
    if uniform:
        write_export(folder, model, task, Path(run) / which)
        left = count_weights(model)
        units = f"{model.config.intermediate_size:,} of {config.intermediate_size:,} units"
        kept = f"{units} in each layer"
    else:
        write_compact(folder, model, task, tokenizer, s, config, sizes)
        left = count_compact(sizes, config.hidden_size)
        kept = describe_compact(sizes, config)
    print(f"{folder}: {left:,} of {total:,} encoder weights ({left / total:.3f}); {kept}")
    for i, (query_sizes, value_sizes, units) in enumerate(sizes):
        line = f"  layer {i:2}: "
        if query_sizes:
            queries = f"{sum(query_sizes)} query and {sum(value_sizes)} value dimensions"
            line += f"{len(query_sizes)} heads of {queries}, "
        print(f"{line}{units:,} units")
    if check:
        before, _, _, _ = load_run(run, which)
        if not uniform:
            model, _ = load_compact(folder)  # as it was written
        dev_sets = load_dev(task, tokenizer, s["max_length"], data_dir)
        compare(before, model, task, dev_sets, device)


def load_for_use(folder):
    """Return (model, task, tokenizer, settings) of a compact folder, as `load_run` does of a run.

    Raises UserError where it is damaged, or where its task file now describes another task.
    """
    path = Path(folder) / "compact.json"
    advice = "--evaluate and --predictions are for a folder that --compact wrote"
    require(path.is_file(), f"{folder}: no compact.json; {advice}")
    model, about = load_compact(folder)
    whole = about.keys() >= {"task", "task_file", "max_length", "labels"}
    require(whole and type(about["max_length"]) is int, f"{path}: not whole; write it again")
    task = trained_on(path, about)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    settings = {"max_length": about["max_length"], "dtype": about.get("dtype", "fp32")}
    return model, task, tokenizer, settings


def evaluate_compact(folder, device, data_dir):
    """Print the metrics on dev of a compact folder."""
    model, task, tokenizer, s = load_for_use(folder)
    dev_sets = load_dev(task, tokenizer, s["max_length"], data_dir)
    metrics = evaluate(model.to(device), task, dev_sets, device, s["dtype"])
    print(f"{folder}: {task.name}, {s['dtype']}: {show(metrics)}")


def count_compact(sizes, hidden_size):
    """Return the number of weights in the encoder's matrices, without those that pad heads."""
    dimensions = 0
    for query_sizes, value_sizes, units in sizes:
        dimensions += sum(query_sizes) + sum(value_sizes) + units
    return 2 * hidden_size * dimensions  # a row or a column in each of two matrices


def describe_compact(sizes, config):
    """Return how many of the attention heads and units of a model are left."""
    heads = sum(len(query_sizes) for query_sizes, _, _ in sizes)
    units = sum(units for _, _, units in sizes)
    all_heads = len(sizes) * config.num_attention_heads
    all_units = len(sizes) * config.intermediate_size
    return f"{heads} of {all_heads} heads, {units:,} of {all_units:,} units"


# -------------------------------------------------------------------------------------------------
# sparse execution on a CPU

# A matrix is stored as CSR up to this density. Measured on two cores, with the shapes of BERT-base
# and MiniLM and 32 to 512 tokens: CSR is 1.0 to 2.4 times as fast as the dense product at density
# 0.15, and 0.8 to 1.8 times at 0.2.
DENSEST = 0.15
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
        units = F.gelu(product(self.intermediate["dense"], readers))  # (F, B, R)
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
    """Compact a model in place, and store as CSR the matrices that are faster so.

    Return how many these are.
    """
    compact(model)
    thin = []
    for linear in encoder_linears(model):
        if linear.weight.count_nonzero() <= DENSEST * linear.weight.numel():
            thin.append(linear)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # CSR is new in torch, and not checked
        for linear in thin:
            linear.weight = nn.Parameter(to_csr(linear.weight), requires_grad=False)
    model.bert = SparseBertModel(model.bert)
    return len(thin)


def to_csr(weight):
    """Return a weight as CSR with 32-bit places, which MKL reads without converting them."""
    csr = weight.to_sparse_csr()
    rows = csr.crow_indices().int()
    columns = csr.col_indices().int()
    return torch.sparse_csr_tensor(rows, columns, csr.values(), csr.shape)


def run_sparse(run, which, data_dir, check=True):
    """Print how many matrices sparse execution changes, and with `check` what that gains."""
    model, task, tokenizer, s = load_run(run, which)
    matrices = len(encoder_linears(model))
    print(f"{run}: {sparse(model)} of {matrices} matrices as CSR")
    dev_sets = load_dev(task, tokenizer, s["max_length"], data_dir)
    if check:
        before, _, _, _ = load_run(run, which)
        compare(before, model, task, dev_sets, CPU)
    else:
        print(f"  {show(evaluate(model, task, dev_sets, CPU, 'fp32'))}")


# -------------------------------------------------------------------------------------------------
# two models of one function


def compare(before, after, task, dev_sets, device):
    """Print how far the logits of two models on dev lie apart, their metrics, and their speed."""
    dev = list(dev_sets.values())[0]
    before = before.to(device).eval()
    after = after.to(device).eval()
    logits_before = predict(before, dev, device, "fp32")
    logits_after = predict(after, dev, device, "fp32")
    most = (logits_before - logits_after).abs().max()
    print(f"logits on {len(dev):,} dev examples differ by {most:.1e} at most")
    for what, logits in (("before", logits_before), ("after", logits_after)):
        metrics = measure(task, to_predictions(task, logits, dev), dev.gold)
        print(f"  {what}: {show(metrics)}")
    for size in (1, 8, 32):
        batch = collate(dev, np.arange(min(size, len(dev))))
        speed(before, after, inputs(batch, device), device)


@torch.no_grad()
def speed(before, after, batch, device, repeat=7):
    """Print the times of one batch: a dense model in fp32 and in bf16, and another, in turn.

    Return the ratios (2,) of the first two to the last.
    """

    def in_fp32():
        before(**batch)

    def in_bf16():
        with autocast(device, "bf16"):
            before(**batch)

    def this():
        after(**batch)

    seconds = alternate([in_fp32, in_bf16, this], device, repeat)  # (repeat, 3)
    ratios = np.median(seconds[:, :2] / seconds[:, 2:], axis=0)
    fp32, bf16, ours = 1e3 * np.median(seconds, axis=0)  # milliseconds
    examples, length = batch["input_ids"].shape
    print(
        f"  {examples:3} x {length:3} tokens: dense {fp32:.1f} ms, in bf16 {bf16:.1f}, "
        f"this {ours:.1f}: {ratios[0]:.2f} and {ratios[1]:.2f} times as fast",
        flush=True,
    )
    return ratios


# -------------------------------------------------------------------------------------------------
# the command line


def parse(argv):
    parser = Parser(__doc__)
    parser.prog = "python -m tools.deploy"
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="run folder of train.py, or a compact folder")
    add("--export", metavar="DIR", help="write the run's model for `transformers`")
    add("--compact", metavar="DIR", help="write the run's model without what its mask made idle")
    add(
        "--drop-rows",
        metavar="R",
        type=number(int, "[0, inf)"),
        help="--compact: first empty the rows that have fewer than R weights",
    )
    add("--uniform", action="store_true", help="--compact: only units go; `transformers` loads it")
    add("--sparse", action="store_true", help="compare the run's model in CSR with itself on a CPU")
    add("--no-check", action="store_true", help="--compact, --sparse: skip comparison and timing")
    add("--best", action="store_true", help="the best checkpoint on dev instead of the last step")
    add("--save-mask", metavar="FILE", help="write the run's mask")
    add("--force", action="store_true", help="overwrite what exists")
    add("--evaluate", action="store_true", help="metrics on dev of a compact folder")
    add("--predictions", metavar="FILE", help="write predictions of a compact folder")
    add("--split", help="split to predict; default test")
    add(
        "--mask", metavar="FILE", action="append", default=[], help="evaluate this mask; repeatable"
    )
    add("--model", help="the base model of --mask: a Hugging Face id or a folder")
    add("--task", help="the task, where the mask file does not name it")
    add("--task-file", metavar="JSON", help="your own task, if the run was on one")
    add("--words", nargs="+", help="label words other than the task's, in the order of the classes")
    add("--data-dir", metavar="DIR", default="data", help="folder of the data; default data")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser.parse_args(argv)


# What the command can do with a run, with a compact folder, and with a base model.
OF_RUN = ("export", "compact", "sparse", "save_mask")
OF_FOLDER = ("evaluate", "predictions")
OF_BASE = ("mask",)
# Each other flag, and what it belongs to. --data-dir and --device belong to everything.
BELONGS = {
    "best": OF_RUN,
    "force": ("export", "compact", "save_mask"),
    "drop_rows": ("compact",),
    "uniform": ("compact",),
    "no_check": ("compact", "sparse"),
    "split": ("predictions",),
    "model": OF_BASE,
    "task": OF_BASE,
    "task_file": OF_BASE,
    "words": OF_BASE,
}


def check_flags(args):
    """Raise UserError where nothing is asked for, or a flag belongs to something else."""
    asked = {name for name in (*OF_RUN, *OF_FOLDER, *OF_BASE) if getattr(args, name)}
    usage = (
        "give RUN with --export, --compact, --sparse or --save-mask; "
        "a folder of --compact with --evaluate or --predictions; or --model BASE --mask FILE"
    )
    one_group = asked and any(asked <= set(group) for group in (OF_RUN, OF_FOLDER, OF_BASE))
    require(one_group, usage)
    if args.mask:
        require(args.model and not args.run, usage)
    else:
        require(args.run, usage)
    for flag, owners in BELONGS.items():
        if getattr(args, flag) and not asked & set(owners):
            names = " or ".join(as_flag(owner) for owner in owners)
            raise UserError(f"{as_flag(flag)}: only with {names}")
    targets = [target for target in (args.export, args.compact, args.save_mask) if target]
    distinct = {Path(target).resolve() for target in targets}
    require(len(distinct) == len(targets), "two outputs have the same name; name different places")
    alone = asked == {"save_mask"} or not (args.save_mask and is_stream(args.save_mask))
    require(alone, f"--save-mask {args.save_mask}: other output would mix with it")


def ship(args):
    """Do what the flags ask of a run."""
    which = "best" if args.best else "model"
    for target in (args.export, args.compact, args.save_mask):
        if target:
            make_room(target, args.run, args.force)
    if args.export:
        export(args.run, args.export, which)
    if args.compact:
        save_compact(
            args.run,
            args.compact,
            which,
            drop_rows=args.drop_rows or 0,
            uniform=args.uniform,
            device=pick_device(args.device),
            data_dir=args.data_dir,
            check=not args.no_check,
        )
    if args.sparse:
        run_sparse(args.run, which, args.data_dir, check=not args.no_check)
    if args.save_mask:
        save_mask(args.run, args.save_mask, which)


def use(args):
    """Do what the flags ask of a compact folder."""
    device = pick_device(args.device)
    if args.evaluate:
        evaluate_compact(args.run, device, args.data_dir)
    if args.predictions:
        loaded = load_for_use(args.run)
        split = args.split or "test"
        path = args.predictions
        write_predictions(loaded, device, args.data_dir, split, path, loaded[1].name)


@program
def main(argv=None):
    args = parse(argv)
    check_flags(args)
    if args.mask:
        evaluate_masks(
            args.model,
            args.mask,
            pick_device(args.device),
            args.data_dir,
            task_name=args.task,
            words=args.words,
            task_file=args.task_file,
        )
    elif args.evaluate or args.predictions:
        use(args)
    else:
        ship(args)


if __name__ == "__main__":
    sys.exit(main())
