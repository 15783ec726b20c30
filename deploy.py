"""Ship what a run has learned.

    python deploy.py RUN --export DIR                      a folder that `transformers` loads, with no code of ours
    python deploy.py RUN --compact DIR                     the same function with what the mask made idle folded away
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
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save as to_safetensors
from safetensors.torch import save as torch_to_safetensors

from bench import alternate
from data import Parser, UserError, atomic_write, collate, get_task, load_tokenizer, program, word_ids
from eval import evaluate, inputs, load_dev, load_run, pick_device, predict, score, show
from model import (
    Bert,
    BertConfig,
    find_model,
    load_model,
    model_sha256,
    read_json,
    read_safetensors,
    save_model,
)
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
    state, labels, kind = model.state_dict(), task.labels, None
    if model.head == "words" and not hasattr(model, "cls"):
        rows = state["bert.embeddings.word_embeddings.weight"][model.words]  # (K, C)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("bert.pooler.")}
        state |= {"classifier.weight": rows, "classifier.bias": torch.zeros(len(rows))}
        labels, kind = labels or task.words[-len(rows) :], "BertForTokenClassification"
    save_model(folder, model, state, Path(run) / which, labels, kind)
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
    share = np.array([kept / total, 1 - kept / total])
    bound = -total * float((share * np.log2(share, where=share > 0, out=np.zeros(2))).sum()) / 8
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
    bias = bias + weight[:, constant] @ torch.nn.functional.gelu(up.bias.double()[constant])
    keep = ~constant & ~unread
    return linear_of(up.weight[keep], up.bias[keep]), linear_of(weight[:, keep], bias)


class CompactAttention(torch.nn.Module):
    """SelfAttention with heads of different sizes: `inner` and `outer` are those of each head's queries and values.

    The projections are as small as the sum of the sizes; for the softmax each head is padded with zeros to the largest.
    `scale` stays that of the original head size.
    """

    def __init__(self, query, key, value, inner, outer, scale):
        super().__init__()
        self.query, self.key, self.value, self.heads, self.scale = query, key, value, len(inner), scale
        self.sizes = inner, outer
        for name, sizes in (("inner", inner), ("outer", outer)):
            places = [h * max(sizes) + d for h, size in enumerate(sizes) for d in range(size)]
            self.register_buffer(name, torch.tensor(places, dtype=torch.long), persistent=False)
        self.width, self.depth = max(inner), max(outer)

    def spread(self, x, places, size):
        """(B, T, sum of sizes) -> (B, H, T, size), zeros where a head is smaller."""
        if len(places) < self.heads * size:
            x = x.new_zeros(*x.shape[:-1], self.heads * size).index_copy_(-1, places, x)
        return x.unflatten(-1, (self.heads, size)).transpose(1, 2)

    def forward(self, hidden, readers, mask):
        q = self.spread(self.query(readers), self.inner, self.width)  # (B, H, R, width)
        k = self.spread(self.key(hidden), self.inner, self.width)  # (B, H, T, width)
        v = self.spread(self.value(hidden), self.outer, self.depth)  # (B, H, T, depth)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=self.scale)  # (B, H, R, depth)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, R, H * depth)
        return mixed if len(self.outer) == mixed.size(-1) else mixed[..., self.outer]  # (B, R, sum of outer)


def compact_attention(attention, output):
    """(CompactAttention, output projection) that compute what a SelfAttention and its output projection do.

    A value dimension with an empty row is its bias, as attention weights sum to one: folded into the output bias; one
    with an empty output column is unread. A key dimension with an empty row adds the same to every score of a query,
    which the softmax cancels. The query dimensions of a head with empty rows are constants and become one: query 1, key
    row sum_d b_q[d] K[d]. A head without value dimensions goes.
    """
    q, k, v = ((m.weight.double(), m.bias.double()) for m in (attention.query, attention.key, attention.value))
    weight, bias = output.weight.double(), output.bias.double()
    size, heads = len(q[0]) // attention.heads, []
    for rows in torch.arange(len(q[0])).split(size):
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
    qw, qb, kw, kb, vw, vb, ow = (torch.cat(part) for part in zip(*heads, strict=True))
    inner, outer = [len(h[0]) for h in heads], [len(h[4]) for h in heads]
    small = CompactAttention(linear_of(qw, qb), linear_of(kw, kb), linear_of(vw, vb), inner, outer, size**-0.5)
    return small, linear_of(ow.T.contiguous(), bias)


@torch.no_grad()
def compact(model):
    """Compact a baked model in place, for evaluation: the function of its weights stays, their number falls."""
    for layer in model.bert.encoder["layer"]:
        attention, inner = layer.attention, layer.intermediate
        attention["self"], attention["output"].dense = compact_attention(attention["self"], attention["output"].dense)
        inner["dense"], layer.output.dense = compact_feed_forward(inner["dense"], layer.output.dense)


def encoder_weights(model):
    """The six matrices of every layer, whatever their sizes."""
    return [layer.get_submodule(name).weight for layer in model.bert.encoder["layer"] for name in MATRICES.values()]


def load_compact(folder):
    """(model, about) of a folder that --compact wrote; UserError where it is damaged."""
    about, (state, _) = read_json(Path(folder) / "compact.json"), read_safetensors(Path(folder) / "compact.safetensors")
    try:
        with torch.device("meta"):
            config = BertConfig(**about["config"])
            parts = [any(name.startswith(part) for name in state) for part in ("bert.pooler.", "cls.predictions.")]
            model = Bert(config, about["head"], about["outputs"], about["words"], *parts)
            width, scale = config.hidden_size, (config.hidden_size // config.num_attention_heads) ** -0.5
        model.words = torch.tensor(about["words"], dtype=torch.long)
        for layer, (inner, outer, units) in zip(model.bert.encoder["layer"], about["sizes"], strict=True):
            shapes = (sum(inner), width), (sum(inner), width), (sum(outer), width)
            linears = [torch.nn.Linear(w, n, device="meta") for n, w in shapes]
            layer.attention["self"] = CompactAttention(*linears, inner, outer, scale)
            layer.attention["output"].dense = torch.nn.Linear(sum(outer), width, device="meta")
            layer.intermediate["dense"] = torch.nn.Linear(width, units, device="meta")
            layer.output.dense = torch.nn.Linear(units, width, device="meta")
        model.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: not a whole compact model ({str(error).splitlines()[0]}); write it again") from None
    return model.eval(), about


def save_compact(run, folder, which, drop_rows, device, data_dir):
    """Write a run's model compacted (`drop_rows`: rows with fewer weights kept are emptied first, which is lossy), in a
    layout of our own, since stock classes cannot hold ragged heads; prints what the written model saves and changes."""
    before, task, tokenizer, s = load_run(run, which)
    model, _, _, _ = load_run(run, which)
    with torch.no_grad():
        for weight in encoder_weights(model):
            weight[weight.count_nonzero(dim=1) < drop_rows] = 0.0
    compact(model)
    layers = model.bert.encoder["layer"]
    sizes = [[*layer.attention["self"].sizes, layer.intermediate["dense"].out_features] for layer in layers]
    about = {"task": s["task"], "task_file": s["task_file"], "max_length": s["max_length"]}
    about |= {"config": vars(model.config), "head": model.head, "outputs": model.outputs, "words": model.words.tolist()}
    about |= {"labels": list(task.labels), "sizes": sizes}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    atomic_write(Path(folder) / "compact.safetensors", torch_to_safetensors(state))
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    atomic_write(Path(folder) / "compact.json", json.dumps(about) + "\n")

    after, _ = load_compact(folder)
    left, total = (sum(weight.numel() for weight in encoder_weights(m)) for m in (after, before))
    heads, units = sum(len(inner) for inner, _, _ in sizes), sum(units for _, _, units in sizes)
    config = model.config
    print(
        f"{folder}: {left:,} of {total:,} encoder weights ({left / total:.3f}); {heads} of "
        f"{len(sizes) * config.num_attention_heads} heads, {units:,} of {len(sizes) * config.intermediate_size:,} units"
    )
    (dev, *_) = load_dev(task, tokenizer, s["max_length"], data_dir).values()
    models = [m.to(device).eval() for m in (before, after)]
    logits = [predict(m, dev, device, "fp32") for m in models]
    faster = []
    for size in (1, 32):
        few = inputs(collate(dev, np.arange(min(size, len(dev)))), device)
        with torch.no_grad():
            seconds = alternate([lambda: before(**few), lambda: after(**few)], device, 7)  # noqa: B023
        faster.append(np.median(seconds[:, 0] / seconds[:, 1]))
    gap = (logits[0] - logits[1]).abs().max()
    print(f"logits on dev differ by {gap:.1e} at most; speed-up {faster[0]:.2f}, at batch 32 {faster[1]:.2f}, fp32")
    for name, table in zip(("before", "after"), logits, strict=True):
        print(f"  {name}: {show(score(task, table, dev.labels))}")


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
    if a.run and (a.save_mask or a.export or a.compact):
        if a.export:
            export(a.run, a.export, which)
        if a.compact:
            save_compact(a.run, a.compact, which, a.drop_rows, pick_device(a.device), a.data_dir)
        if a.save_mask:
            save_mask(a.run, a.save_mask)
    elif a.mask and a.model:
        evaluate_masks(a.model, a.mask, pick_device(a.device), a.data_dir, a.task, a.words, a.task_file)
    else:
        raise UserError("give RUN with --export, --compact or --save-mask, or --model BASE --mask FILE")


if __name__ == "__main__":
    sys.exit(main())
