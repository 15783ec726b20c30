"""Ship what a run has learned.

    python deploy.py RUN --export DIR                      a folder that `transformers` loads, with no code of ours
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

from data import Parser, UserError, atomic_write, get_task, load_tokenizer, word_ids
from eval import evaluate, load_dev, load_run, pick_device
from model import find_model, load_model, model_sha256, read_json, read_safetensors, save_model
from prune import MATRICES, METHODS, mask_layers

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
# evaluating masks: one base, many tasks


def masked_base(base, device):
    """(model with every weight kept, {matrix: MaskedLinear}) of a base model, nothing trainable."""
    model = load_model(base, "words", words=[0]).requires_grad_(False)
    mask_layers(model.bert.encoder["layer"], first=None)
    model.to(device)
    names = [f"bert.encoder.layer.{i}.{n}" for i in range(model.config.num_hidden_layers) for n in MATRICES.values()]
    return model, {name: model.get_submodule(name) for name in names}


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
        shown = "  ".join(f"{name} {100 * value:.2f}" for name, value in metrics.items())
        print(f"{path}: {task.name}, density {density:.4f}: {shown}")
        found.append(metrics)
    return found


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="run folder of train.py")
    parser.add_argument("--export", metavar="DIR", help="write the run's model for `transformers`")
    parser.add_argument("--best", action="store_true", help="export the best checkpoint on dev, not the last step")
    parser.add_argument("--save-mask", metavar="FILE", help="write the run's mask")
    parser.add_argument("--mask", metavar="FILE", action="append", default=[], help="evaluate this mask; repeatable")
    parser.add_argument("--model", help="the base model of --mask: a Hugging Face id or a folder")
    parser.add_argument("--task", help="the task, where the mask file does not name it")
    parser.add_argument("--task-file", metavar="JSON", help="your own task, if the run was on one")
    parser.add_argument("--words", nargs="+", help="label words other than the task's, in class order")
    parser.add_argument("--data-dir", default="data", help="folder of the GLUE files (default: data)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    try:
        a = parser.parse_args(argv)
        if a.run and (a.save_mask or a.export):
            if a.export:
                export(a.run, a.export, "best" if a.best else "model")
            if a.save_mask:
                save_mask(a.run, a.save_mask)
        elif a.mask and a.model:
            evaluate_masks(a.model, a.mask, pick_device(a.device), a.data_dir, a.task, a.words, a.task_file)
        else:
            raise UserError("give RUN with --export or --save-mask, or --model BASE --mask FILE")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
