"""Ship what a run has learned.

    python deploy.py RUN --export DIR                      a folder that `transformers` loads, with no code of ours
    python deploy.py RUN --compact DIR                     the same function with what the mask made idle folded away
    python deploy.py RUN --sparse                          its metrics and speed with CSR matrices on a CPU
    python deploy.py RUN --save-mask FILE                  a SMP task as one small file: a mask over public weights
    python deploy.py --model BASE --mask FILE [--mask FILE ...]      evaluate such files, one base in memory for all
    python deploy.py --model BASE --mask MNLI.npy --task mnli --words maybe no yes    a mask released with the SMP paper

A mask file is a safetensors file: one tensor of bytes, and in its header, as JSON, the base model's name and sha256,
the task, its label words and the density. Per matrix the places of the rarer value (kept or not) are stored as the gaps
between them, a byte each (255: carry on), Huffman-coded by zlib: the entropy of the mask, or less where rows are empty.
"""

import hashlib
import json
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save as to_safetensors
from safetensors.torch import save as torch_to_safetensors
from torch.nn.utils.rnn import pad_sequence

from bench import alternate
from data import Parser, UserError, atomic_write, collate, get_task, load_tokenizer, program, word_ids
from eval import autocast, entropy, evaluate, inputs, load_dev, load_run, pick_device, predict, score, show
from model import Bert, BertConfig, find_model, load_model, model_sha256, read_json, read_safetensors, save_model
from prune import MATRICES, METHODS, mask_layers, masked_linears

# ---------------------------------------------------------------------------------------------------------------------
# export


def export(run, folder, which):
    """Write a run's model, masks baked in, as a folder for the class of `transformers` that computes the same function.

    Pooler and classifier: BertForSequenceClassification. Label words through the whole MLM head: BertForMaskedLM, whose
    logits at position 0 are read at the label words (`label_words` in its config). Label words alone:
    BertForTokenClassification, read at position 0, whose classifier is the words' rows of the embedding.
    """
    model, task, _, _ = load_run(run, which)
    write_export(folder, model, task, Path(run) / which)


def write_export(folder, model, task, source):
    """The folder for `model`; `source`: where its tokenizer's files are."""
    state, labels, kind = model.state_dict(), task.labels, None
    if model.head == "words" and not hasattr(model, "cls"):
        rows = state["bert.embeddings.word_embeddings.weight"][model.words]  # (K, C)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("bert.pooler.")}
        state |= {"classifier.weight": rows, "classifier.bias": torch.zeros(len(rows))}
        labels, kind = labels or task.words[-len(rows) :], "BertForTokenClassification"
    save_model(folder, model, state, source, labels, kind)
    config = read_json(Path(folder) / "config.json")
    if config["architectures"] == ["BertForMaskedLM"]:
        config |= {"label_words": task.words[-model.outputs :], "label_word_ids": model.words.tolist()}
        atomic_write(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")
    print(f"{folder}: {config['architectures'][0]}, for transformers.AutoModel{config['architectures'][0][4:]}")


# ---------------------------------------------------------------------------------------------------------------------
# masks as bytes


def pack(mask):
    """Bytes of a flat bool array, losslessly; see above."""
    rare = mask if 2 * np.count_nonzero(mask) <= mask.size else ~mask
    gaps = np.diff(np.flatnonzero(rare), prepend=-1) - 1
    ends = np.cumsum(gaps // 255 + 1) - 1  # where each gap's last byte stands, after as many 255s as it needs
    symbols = np.full(ends[-1] + 1 if len(ends) else 0, 255, np.uint8)
    symbols[ends] = gaps % 255
    huffman = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return huffman.compress(symbols.tobytes()) + huffman.flush()


def unpack(data, size, kept):
    """The flat bool mask of `size` with `kept` True that `pack` made `data` of; ValueError where it is not such."""
    symbols = np.frombuffer(zlib.decompress(data, -15), np.uint8)
    ends = np.flatnonzero(symbols != 255)
    gaps = np.diff(symbols.cumsum(dtype=np.int64)[ends], prepend=0)
    places, few = np.cumsum(gaps + 1) - 1, min(kept, size - kept)
    if len(places) != few or (few and places[-1] >= size):
        raise ValueError("does not hold as many places as it should")
    mask = np.zeros(size, bool)
    mask[places] = True
    return mask if 2 * kept <= size else ~mask


def digest(about, payload):
    """What ties the header to the bytes: a flipped bit in either shows."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode() + payload).hexdigest()


def save_mask(run, path):
    """Write the mask of a finished SMP run to `path`; prints its size and the entropy bound."""
    run = Path(run)
    config = read_json(run / "config.json")
    s = config.get("settings", {})
    if METHODS.get(s.get("method"), METHODS["dense"]).head != "words":
        raise UserError(f"{run}: a {s.get('method')} run trains weights; only those of smp-l and smp-s are masks alone")
    tensors, _ = read_safetensors(run / "scores.safetensors")
    masks = {name: tensor.numpy() for name, tensor in sorted(tensors.items()) if name.endswith(".mask")}
    packed = [pack(mask.reshape(-1)) for mask in masks.values()]
    task = get_task(s["task"], s["task_file"])
    about = {"format": 1, "base": s["model"], "base_sha256": config["model_sha256"], "task": s["task"]}
    about |= {"labels": config["labels"], "words": list(task.words[-config["outputs"] :]), "method": s["method"]}
    about |= {"density": s["density"], "max_length": s["max_length"], "dtype": config["dtype"]}
    about["matrices"] = [
        [name.removesuffix(".mask"), *mask.shape, int(mask.sum()), len(data)]
        for (name, mask), data in zip(masks.items(), packed, strict=True)
    ]
    payload = b"".join(packed)
    header = {"mask": json.dumps(about), "sha256": digest(about, payload)}
    atomic_write(path, to_safetensors({"mask": np.frombuffer(payload, np.uint8)}, metadata=header))
    kept, total = sum(mask.sum() for mask in masks.values()), sum(mask.size for mask in masks.values())
    bound = total * entropy(kept / total) / 8
    size = Path(path).stat().st_size
    print(f"{path}: {size:,} bytes, density {kept / total:.4f}; entropy bound {bound:,.0f}, ratio {size / bound:.3f}")


def read_mask(path):
    """(about, {matrix: bool array (out, in)}) of a mask file; UserError where it is damaged or something else."""
    tensors, header = read_safetensors(path)
    try:
        about, payload = json.loads(header["mask"]), tensors["mask"].numpy().tobytes()
        if header["sha256"] != digest(about, payload):
            raise ValueError("its checksum does not fit")
        masks, start = {}, 0
        for name, rows, columns, kept, size in about["matrices"]:
            masks[name] = unpack(payload[start : start + size], rows * columns, kept).reshape(rows, columns)
            start += size
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a whole mask file ({error}); copy it again") from None
    return about, masks


def read_released(path, shapes):
    """{matrix: bool array} of a mask released with the SMP paper: bits of all matrices, keys in lexicographic order."""
    try:
        bits = np.unpackbits(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a .npy of packed bits ({error})") from None
    total = sum(rows * columns for rows, columns in shapes.values())
    if not total <= bits.size < total + 8:
        raise UserError(f"{path}: {bits.size:,} bits, but this model's encoder matrices have {total:,} weights")
    masks, start = {}, 0
    for name in sorted(shapes, key=lambda name: f"{name}.mask_scores"):
        rows, columns = shapes[name]
        masks[name] = bits[start : start + rows * columns].astype(bool).reshape(rows, columns)
        start += rows * columns
    return masks


# ---------------------------------------------------------------------------------------------------------------------
# exact compaction: what a mask makes constant or unread is folded away, and the function stays the same


def linear_of(weight, bias):
    """An nn.Linear with these values."""
    linear = torch.nn.Linear(1, 1, device="meta")  # with its own sizes it would warn of an empty matrix
    linear.out_features, linear.in_features = weight.shape
    linear.weight, linear.bias = torch.nn.Parameter(weight.float()), torch.nn.Parameter(bias.float())
    return linear.requires_grad_(False)


def compact_feed_forward(up, down):
    """(up, down) without the units that are constant (an empty up-row: GELU of its bias, folded into the next bias) or
    unread (an empty down-column)."""
    weight, bias = down.weight.double(), down.bias.double()
    constant, unread = ~up.weight.any(1), ~down.weight.any(0)  # (F,)
    bias = bias + weight[:, constant] @ F.gelu(up.bias.double()[constant])
    keep = ~constant & ~unread
    return linear_of(up.weight[keep], up.bias[keep]), linear_of(weight[:, keep], bias)


def compact_attention(attention, output):
    """(output projection, its heads' query and value sizes) after making a SelfAttention compact in place.

    A value dimension with an empty row is its bias, as attention weights sum to one: folded into the output bias; one
    with an empty output column is unread. A key dimension with an empty row adds the same to every score of a query,
    which the softmax cancels. The query dimensions of a head with empty rows are constants and become one: query 1, key
    row sum_d b_q[d] K[d]. A head without value dimensions goes.
    """
    q, k, v = ((m.weight.double(), m.bias.double()) for m in (attention.query, attention.key, attention.value))
    weight, bias = output.weight.double(), output.bias.double()
    heads = []
    for rows in torch.arange(len(q[0])).chunk(attention.heads):
        constant = ~v[0][rows].any(1)
        bias = bias + weight[:, rows[constant]] @ v[1][rows[constant]]
        values = rows[~constant & weight[:, rows].any(0)]
        if not len(values):
            continue
        rows = rows[k[0][rows].any(1)]
        fixed, rows = rows[~q[0][rows].any(1)], rows[q[0][rows].any(1)]
        parts = [q[0][rows], q[1][rows], k[0][rows], k[1][rows]]
        merged = q[1][fixed] @ k[0][fixed]  # (n,) x (n, C) -> (C,)
        if merged.any() or not len(rows):  # a head keeps at least one dimension
            extra = [torch.zeros_like(merged)[None], merged.new_ones(1), merged[None], merged.new_zeros(1)]
            parts = [torch.cat(pair) for pair in zip(parts, extra, strict=True)]
        heads.append([*parts, v[0][values], v[1][values], weight[:, values].T])
    if not heads:  # nothing is read: one head of one zero
        zero = weight.new_zeros(1, weight.size(0))
        heads = [[zero, zero[:, 0], zero, zero[:, 0], zero, zero[:, 0], zero]]
    qw, qb, kw, kb, vw, vb, ow = (pad_heads(part) for part in zip(*heads, strict=True))
    attention.query, attention.key, attention.value = linear_of(qw, qb), linear_of(kw, kb), linear_of(vw, vb)
    attention.heads = len(heads)  # its scale stays that of the original head size
    return linear_of(ow.T.contiguous(), bias), [len(h[0]) for h in heads], [len(h[4]) for h in heads]


def pad_heads(parts):
    """(H * n, ...) from the (n_h, ...) of each head, zeros after its own: once, rather than in every forward."""
    return pad_sequence(list(parts), batch_first=True).flatten(0, 1)


def change_heads(state, sizes, change):
    """change(tensor, sizes of the heads), in place, of all in a state dict that heads divide: rows of Q, K, V, columns
    of O."""
    for i, (inner, outer, _) in enumerate(sizes):
        at = f"bert.encoder.layer.{i}.attention."
        for name, n in (("query", inner), ("key", inner), ("value", outer)):
            for kind in ("weight", "bias"):
                state[f"{at}self.{name}.{kind}"] = change(state[f"{at}self.{name}.{kind}"], n)
        state[f"{at}output.dense.weight"] = change(state[f"{at}output.dense.weight"].T, outer).T.contiguous()


def encoder_linears(model):
    """The six linear layers of every layer, whatever their sizes."""
    return [layer.get_submodule(name) for layer in model.bert.encoder["layer"] for name in MATRICES.values()]


@torch.no_grad()
def compact(model, uniform=False, drop_rows=0):
    """Compact a baked model in place, for evaluation: the function of its weights stays, their number falls. Returns
    [query sizes of the heads, value sizes, units] of each layer. `uniform`: only what stock classes can hold, the same
    number of units in every layer. `drop_rows`: rows with fewer weights are emptied first; lossy."""
    sizes, layers = [], model.bert.encoder["layer"]
    for linear in encoder_linears(model):
        linear.weight[linear.weight.count_nonzero(dim=1) < drop_rows] = 0.0
    for layer in layers:
        attention, inner = layer.attention, layer.intermediate
        inner["dense"], layer.output.dense = compact_feed_forward(inner["dense"], layer.output.dense)
        sizes.append([[], [], inner["dense"].out_features])
        if not uniform:
            attention["output"].dense, *sizes[-1][:2] = compact_attention(attention["self"], attention["output"].dense)
    if uniform:
        model.config.intermediate_size = most = max(units for _, _, units in sizes) or 1
        for layer in layers:
            up, down = layer.intermediate["dense"], layer.output.dense
            more = most - up.out_features  # units of zeros
            layer.intermediate["dense"] = linear_of(F.pad(up.weight, (0, 0, 0, more)), F.pad(up.bias, (0, more)))
            layer.output.dense = linear_of(F.pad(down.weight, (0, more)), down.bias)
    return sizes


def load_compact(folder):
    """(model, about) of a folder that --compact wrote; UserError where it is damaged."""
    about, (state, _) = read_json(Path(folder) / "compact.json"), read_safetensors(Path(folder) / "compact.safetensors")
    try:
        with torch.device("meta"):
            config = BertConfig(**about["config"])
            parts = [any(name.startswith(part) for name in state) for part in ("bert.pooler.", "cls.predictions.")]
            model = Bert(config, about["head"], about["outputs"], about["words"], *parts)
        model.words = torch.tensor(about["words"], dtype=torch.long)
        change_heads(state, about["sizes"], lambda tensor, n: pad_heads(tensor.split(n)))
        for i, (layer, (inner, _, units)) in enumerate(zip(model.bert.encoder["layer"], about["sizes"], strict=True)):
            layer.attention["self"].heads = len(inner)
            for name in MATRICES.values():
                linear, at = layer.get_submodule(name), f"bert.encoder.layer.{i}.{name}"
                linear.weight, linear.bias = (torch.nn.Parameter(state[f"{at}.{kind}"]) for kind in ("weight", "bias"))
            if len(layer.intermediate["dense"].weight) != units:
                raise ValueError(f"layer {i} has other than {units} units")
        model.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: not a whole compact model ({str(error).splitlines()[0]}); write it again") from None
    return model.eval(), about


def save_compact(run, folder, which, drop_rows, uniform, device, data_dir):
    """Write a run's model compacted, and print what it saves and changes. Stock classes cannot hold heads of different
    sizes: the layout is ours, or with `uniform` theirs."""
    before, task, tokenizer, s = load_run(run, which)
    after, _, _, _ = load_run(run, which)
    sizes = compact(after, uniform, drop_rows)
    config, total = before.config, sum(linear.weight.numel() for linear in encoder_linears(before))
    if uniform:
        write_export(folder, after, task, Path(run) / which)
        left = sum(linear.weight.numel() for linear in encoder_linears(after))
        kept = f"{after.config.intermediate_size:,} of {config.intermediate_size:,} units in each layer"
    else:
        about = {"task": s["task"], "task_file": s["task_file"], "max_length": s["max_length"], "head": after.head}
        about |= {"config": vars(config), "outputs": after.outputs, "words": after.words.tolist()}
        about |= {"labels": list(task.labels), "sizes": sizes}
        state = after.state_dict()
        change_heads(state, sizes, lambda tensor, n: torch.cat(
            [head[:size] for head, size in zip(tensor.unflatten(0, (len(n), -1)), n, strict=True)]))  # fmt: skip
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        atomic_write(Path(folder) / "compact.safetensors", torch_to_safetensors(state))
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        atomic_write(Path(folder) / "compact.json", json.dumps(about) + "\n")
        after, _ = load_compact(folder)
        left = sum(2 * config.hidden_size * (sum(inner) + sum(outer) + units) for inner, outer, units in sizes)
        kept = f"{sum(len(inner) for inner, _, _ in sizes)} of {len(sizes) * config.num_attention_heads} heads, "
        kept += f"{sum(units for _, _, units in sizes):,} of {len(sizes) * config.intermediate_size:,} units"
    print(f"{folder}: {left:,} of {total:,} encoder weights ({left / total:.3f}); {kept}")
    for i, (inner, outer, units) in enumerate(sizes):
        went = f"{len(inner)} heads of {sum(inner)} query and {sum(outer)} value dimensions, " * bool(inner)
        print(f"  layer {i:2}: {went}{units:,} units")
    compare(before, after, task, load_dev(task, tokenizer, s["max_length"], data_dir), device)


# ---------------------------------------------------------------------------------------------------------------------
# sparse execution on a CPU

# Measured on two cores. Shapes of BERT-base and MiniLM, 32 to 512 tokens: CSR is 1.0 to 2.4 times as fast as the dense
# product at density 0.15, 0.8 to 1.8 times at 0.2. Whole BERT-base: 128 tokens the same, 1,024 up to 11% slower.
DENSEST = 0.15  # a matrix is stored as CSR up to this density
TOKENS = 256  # computed at a time, so that what a layer makes stays in the cache


class SparseLayer(torch.nn.Module):
    """A Layer over activations (C, B, T): in this layout a product with a CSR matrix on the left transposes nothing."""

    def __init__(self, layer):
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output

    @staticmethod
    def product(linear, x):
        y = torch.addmm(linear.bias[:, None], linear.weight, x.flatten(1))  # (out, in) x (in, B * T)
        return y.unflatten(1, x.shape[1:])

    @staticmethod
    def norm(x, layer_norm):
        x = x - x.mean(0)
        x *= (x.square().mean(0) + layer_norm.eps).rsqrt()
        return torch.addcmul(layer_norm.bias[:, None, None], x, layer_norm.weight[:, None, None])

    def forward(self, hidden, mask, first_only=False):
        readers, attention = hidden[..., :1] if first_only else hidden, self.attention["self"]
        pairs = (attention.query, readers), (attention.key, hidden), (attention.value, hidden)
        q, k, v = (self.product(*pair).unflatten(0, (attention.heads, -1)) for pair in pairs)  # (H, D, B, T)
        q, k, v = (x.permute(2, 0, 3, 1).contiguous() for x in (q, k, v))  # (B, H, T, D), as the fast kernel needs it
        mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=attention.scale)
        mixed = mixed.permute(1, 3, 0, 2).flatten(0, 1)  # (C, B, T)
        output = self.attention["output"]
        readers = self.norm(readers + self.product(output.dense, mixed), output.LayerNorm)
        inner = F.gelu(self.product(self.intermediate["dense"], readers))  # (F, B, T)
        return self.norm(readers + self.product(self.output.dense, inner), self.output.LayerNorm)


class SparseBertModel(torch.nn.Module):
    """In place of a BertModel, for evaluation."""

    def __init__(self, bert):
        super().__init__()
        self.embeddings, self.pooler = bert.embeddings, getattr(bert, "pooler", None)
        self.encoder = torch.nn.ModuleDict({"layer": torch.nn.ModuleList(map(SparseLayer, bert.encoder["layer"]))})

    def forward(self, input_ids, attention_mask, token_type_ids, first_only=False):
        count, done = max(1, TOKENS // input_ids.size(1)), []
        parts = zip(*(x.split(count) for x in (input_ids, attention_mask, token_type_ids)), strict=True)
        for ids, mask, types in parts:
            hidden = self.embeddings(ids, types).permute(2, 0, 1).contiguous()  # (B, T, C) -> (C, B, T)
            mask = mask.bool()[:, None, None, :]  # (B, 1, 1, T)
            *body, last = self.encoder["layer"]
            for layer in body:
                hidden = layer(hidden, mask)
            done.append(last(hidden, mask, first_only).permute(1, 2, 0))  # (B, T, C)
        return torch.cat(done)


@torch.no_grad()
def sparse(model):
    """Compact a baked model in place and let it compute with CSR matrices, where that is faster; how many are."""
    compact(model)
    thin = [m for m in encoder_linears(model) if m.weight.count_nonzero() <= DENSEST * m.weight.numel()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # that CSR is new in torch, and unchecked
        for linear in thin:
            csr = linear.weight.to_sparse_csr()
            places = csr.crow_indices().int(), csr.col_indices().int()  # what MKL reads: else converted every time
            csr = torch.sparse_csr_tensor(*places, csr.values(), csr.shape)
            linear.weight = torch.nn.Parameter(csr, requires_grad=False)
    model.bert = SparseBertModel(model.bert)
    return len(thin)


def compare(before, after, task, dev_sets, device):
    """Print how far the logits of two models on dev lie apart, their metrics, and their speed."""
    dev = next(iter(dev_sets.values()))
    before, after = (m.to(device).eval() for m in (before, after))
    logits = [predict(m, dev, device, "fp32") for m in (before, after)]
    print(f"logits on {len(dev):,} dev examples differ by {(logits[0] - logits[1]).abs().max():.1e} at most")
    for name, table in zip(("before", "after"), logits, strict=True):
        print(f"  {name}: {show(score(task, table, dev.labels))}")
    for size in (1, 8, 32):
        speed(before, after, inputs(collate(dev, np.arange(min(size, len(dev)))), device), device)


@torch.no_grad()
def speed(before, after, batch, device, repeat=7):
    """Print the times of one batch: a dense model in fp32 and in bf16, and another, in turn. Returns the ratios."""

    def half():
        with autocast(device, "bf16"):
            before(**batch)

    seconds = alternate([lambda: before(**batch), half, lambda: after(**batch)], device, repeat)
    ratios = np.median(seconds[:, :2] / seconds[:, 2:], axis=0)
    full, half, ours = 1e3 * np.median(seconds, axis=0)
    print(
        f"  {batch['input_ids'].size(0):3} x {batch['input_ids'].size(1):3} tokens: dense {full:.1f} ms, in bf16 "
        f"{half:.1f}, this {ours:.1f}: {ratios[0]:.2f} and {ratios[1]:.2f} times as fast",
        flush=True,
    )
    return ratios


def run_sparse(run, which, data_dir):
    """Print what sparse execution changes and gains on a run."""
    before, task, tokenizer, s = load_run(run, which)
    after, _, _, _ = load_run(run, which)
    print(f"{run}: {sparse(after)} of {6 * before.config.num_hidden_layers} matrices as CSR")
    compare(before, after, task, load_dev(task, tokenizer, s["max_length"], data_dir), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# evaluating masks: one base, many tasks


def masked_base(base, device):
    """(model with every weight kept, {matrix: MaskedLinear}) of a base model, nothing trainable."""
    model = load_model(base, "words", words=[0]).requires_grad_(False)
    mask_layers(model.bert.encoder["layer"], first=None)
    return model.to(device), masked_linears(model)


def switch(model, linears, masks, words):
    """Make the base in memory the model of another task: its masks, and its label words (vocabulary ids)."""
    for name, linear in linears.items():
        linear.mask.copy_(torch.from_numpy(masks[name]))
    model.words, model.outputs = torch.tensor(words, device=model.words.device), len(words)


def evaluate_masks(base, paths, device, data_dir, task_name=None, words=(), task_file=None):
    """Print the dev metrics of each mask file over `base`; returns them."""
    source = find_model(base)
    sha256, found = model_sha256(source), []
    model, linears = masked_base(source, device)
    tokenizer = load_tokenizer(source, model.config.vocab_size)
    shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items()}
    for path in paths:
        if str(path).endswith(".npy"):
            if not task_name:
                raise UserError(f"{path}: a released mask does not name its task; give --task")
            masks, about = read_released(path, shapes), {"task": task_name, "max_length": 128, "dtype": "fp32"}
        else:
            about, masks = read_mask(path)
            if about["base_sha256"] != sha256:
                raise UserError(
                    f"{path}: a mask over {about['base']} (sha256 {about['base_sha256'][:12]}...); {base} is another "
                    f"model (sha256 {sha256[:12]}...)"
                )
        task = get_task(task_name or about["task"], task_file)
        switch(model, linears, masks, word_ids(tokenizer, words or about.get("words") or task.words))
        dev = load_dev(task, tokenizer, about["max_length"], data_dir)
        metrics = evaluate(model, task, dev, device, about["dtype"])
        density = sum(mask.sum() for mask in masks.values()) / sum(mask.size for mask in masks.values())
        print(f"{path}: {task.name}, density {density:.4f}: {show(metrics)}")
        found.append(metrics)
    return found


@program
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="run folder of train.py")
    parser.add_argument("--export", metavar="DIR", help="write the run's model for `transformers`")
    parser.add_argument("--compact", metavar="DIR", help="write the run's model without what its mask made idle")
    parser.add_argument("--drop-rows", metavar="R", type=int, default=0, help="--compact: empty rows of fewer than R")
    parser.add_argument("--uniform", action="store_true", help="--compact: what `transformers` can hold, its way")
    parser.add_argument("--sparse", action="store_true", help="compare the run's model in CSR with itself, on the CPU")
    parser.add_argument("--best", action="store_true", help="export the best checkpoint on dev, not the last step")
    parser.add_argument("--save-mask", metavar="FILE", help="write the run's mask")
    parser.add_argument("--mask", metavar="FILE", action="append", default=[], help="evaluate this mask; repeatable")
    parser.add_argument("--model", help="the base model of --mask: a Hugging Face id or a folder")
    parser.add_argument("--task", help="the task, where the mask file does not name it")
    parser.add_argument("--task-file", metavar="JSON", help="your own task, if the run was on one")
    parser.add_argument("--words", nargs="+", help="label words other than the task's, in class order")
    parser.add_argument("--data-dir", default="data", help="folder of the GLUE files (default: data)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    a = parser.parse_args(argv)
    which = "best" if a.best else "model"
    if a.run and (a.save_mask or a.export or a.compact or a.sparse):
        if a.export:
            export(a.run, a.export, which)
        if a.compact:
            save_compact(a.run, a.compact, which, a.drop_rows, a.uniform, pick_device(a.device), a.data_dir)
        if a.sparse:
            run_sparse(a.run, which, a.data_dir)
        if a.save_mask:
            save_mask(a.run, a.save_mask)
    elif a.mask and a.model:
        evaluate_masks(a.model, a.mask, pick_device(a.device), a.data_dir, a.task, a.words, a.task_file)
    else:
        raise UserError("give RUN with --export, --compact, --sparse or --save-mask, or --model BASE --mask FILE")


if __name__ == "__main__":
    sys.exit(main())
