"""Mask files: a task that SMP has learned, as a few hundred kilobytes.

`python -m tools.deploy` writes and evaluates them.

A mask file is a safetensors file with one tensor of bytes. Its header holds, as JSON, the name and
the sha256 of the base model, the task, its label words and the density. For each matrix the bytes
are the places of the rarer value (kept or not), stored as the gaps between them and coded by zlib.
They take about the entropy of the mask, or less where rows are empty.
"""

import hashlib
import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save as numpy_to_safetensors

from data import get_task, kind_of, load_dev, with_settings
from eval import entropy, evaluate
from models.checkpoint import load_model, model_sha256, read_config
from models.runs import read_run_config, trained_on
from models.tokenizer import load_tokenizer, word_ids
from prune import METHODS, mask_matrices, masked_linears
from support.fetch import find_model
from support.files import atomic_write, is_stream
from support.machine import DTYPES
from support.recipes import COMMON, COMMON_OF_KIND
from support.tensors import read_safetensors
from support.terminal import UserError, show, tell

# ---------- masks as bytes ------------------------------------------------------------------------


def pack(mask):
    """Return bytes that hold a flat bool array without loss.

    The places of the rarer value are stored as gaps: how many of the other value come before each.
    A gap of 600 is stored as the bytes 255, 255, 90. The bytes are Huffman-coded by zlib.
    """
    rare = mask if 2 * np.count_nonzero(mask) <= mask.size else ~mask
    gaps = np.diff(np.flatnonzero(rare), prepend=-1) - 1
    lengths = gaps // 255 + 1  # in bytes
    symbols = np.full(lengths.sum(), 255, np.uint8)
    symbols[np.cumsum(lengths) - 1] = gaps % 255  # the last byte of each gap
    huffman = zlib.compressobj(level=9, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return huffman.compress(symbols.tobytes()) + huffman.flush()


def unpack(data, size, kept):
    """Return the flat bool array from which `pack` made `data`.

    It has `size` values, of which `kept` are True. Raises ValueError or zlib.error for other bytes.
    A few bytes can unpack to gigabytes, so the unpacked size is limited.
    """
    most = min(kept, size - kept) + size // 255 + 1  # bytes of all gaps
    stream = zlib.decompressobj(wbits=-15)
    symbols = np.frombuffer(stream.decompress(data, most), np.uint8)
    if not stream.eof or stream.unused_data:
        raise ValueError("holds more or less than a mask of its size")
    ends = np.flatnonzero(symbols != 255)  # the last byte of each gap
    sums = symbols.cumsum(dtype=np.int64)[ends]  # of all gaps up to each
    gaps = np.diff(sums, prepend=0)
    places = np.cumsum(gaps + 1) - 1
    expected = min(kept, size - kept)
    if len(places) != expected or (expected and places[-1] >= size):
        raise ValueError("does not hold as many places as it should")
    rare = np.zeros(size, bool)
    rare[places] = True
    return rare if 2 * kept <= size else ~rare


def digest(about, payload):
    """Return the checksum of a mask file's header and bytes: it changes with any bit of either."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode() + payload).hexdigest()


def count(masks):
    """Return (kept weights, all weights) of {matrix: bool array}."""
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.size for mask in masks.values())
    return kept, total


def save_mask(run, path, which="model"):
    """Write the mask of a finished SMP run to `path`; print its size and the entropy bound.

    `which` is "model", the last step, or "best", the best checkpoint on dev. Raises UserError
    where the run has trained weights, because the mask is then not all of it.
    """
    run = Path(run)
    config = read_run_config(run)
    if not is_mask_alone(config):
        method = config["settings"]["method"]
        advice = "only those of smp-l and smp-s are masks alone"
        raise UserError(f"{run}: a {method} run trains weights; {advice}")
    masks = read_masks_of_run(run if which == "model" else run / which)
    packed = {name: pack(mask.reshape(-1)) for name, mask in masks.items()}  # (out, in) -> (numel,)
    about = describe_mask(run, config, masks, packed)
    payload = b"".join(packed.values())
    header = {"mask": json.dumps(about), "sha256": digest(about, payload)}
    data = numpy_to_safetensors({"mask": np.frombuffer(payload, np.uint8)}, metadata=header)
    atomic_write(path, data)
    kept, total = count(masks)
    bound = total * entropy(kept / total) / 8
    ratio = len(data) / bound if bound else math.inf
    tell(
        f"{path}: {len(data):,} bytes, density {kept / total:.4f}; "
        f"entropy bound {bound:,.0f}, ratio {ratio:.3f}",
        sys.stderr if is_stream(path) else sys.stdout,
    )


def is_mask_alone(config):
    """Has the run with this config learned nothing but scores?"""
    method = config["settings"]["method"]
    older = method in list(METHODS) and METHODS[method].output_head == "words"
    return config.get("only_scores", older)  # older runs do not say it


def read_masks_of_run(folder):
    """Return {matrix: bool array (out, in)} from the scores in `folder`, in order of the names."""
    path = folder / "scores.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such file; finish the run, or train it again")
    tensors, _ = read_safetensors(path)
    if not any(name.endswith(".mask") for name in tensors):
        raise UserError(f"{path}: holds no mask")
    masks = {}
    for name in sorted(tensors):
        if name.endswith(".mask"):
            masks[name.removesuffix(".mask")] = tensors[name].numpy()
    return masks


def describe_mask(run, config, masks, packed):
    """Return what the header of a mask file holds as JSON.

    `matrices` has for each matrix its name, its two sizes, how many of its weights are kept, and
    the length of its bytes.
    """
    s = config["settings"]
    task = with_settings(trained_on(run, s | config), s, run)
    matrices = []
    for name, mask in masks.items():
        matrices.append([name, *mask.shape, int(mask.sum()), len(packed[name])])
    return {
        "format": 1,
        "base": s["model"],
        "base_sha256": config["model_sha256"],
        "task": s["task"],
        "labels": config["labels"],
        "kind": task.kind,
        "words": list(task.words[-config["outputs"] :]) if config["words"] else [],
        "settings": task.settings,
        "method": s["method"],
        "density": s["density"],
        "max_length": s["max_length"],
        "dtype": config["dtype"],
        "matrices": matrices,
    }


# What the header of a mask file must hold, and of which type.
ABOUT = dict.fromkeys(("base", "base_sha256", "task", "dtype"), str)
ABOUT |= dict.fromkeys(("labels", "words", "matrices"), list) | {"max_length": int}


def read_mask(path):
    """Return (what the header says, the packed bytes) of a mask file; `unpack_all` unpacks them.

    Raises UserError where the file is damaged or something else.
    """
    tensors, header = read_safetensors(path)
    try:
        about = json.loads(header["mask"])
        payload = tensors["mask"].numpy().tobytes()
        if header["sha256"] != digest(about, payload):
            raise ValueError("its checksum does not fit")
        for name, expected in ABOUT.items():
            if type(about[name]) is not expected:
                raise ValueError(f"{name} is {about[name]!r}")
        if about["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {about['dtype']!r}")
        for word in about["words"]:
            word.encode()  # a ValueError for half a character
    except KeyError as error:
        raise UserError(f"{path}: not a whole mask file (no {error}); copy it again") from None
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a whole mask file ({error}); copy it again") from None
    return about, payload


def unpack_all(path, matrices, payload, shapes):
    """Return {matrix: bool array (out, in)} from the `payload` of a mask file.

    `matrices` is what its header says of them, `shapes` is {matrix: (out, in)} of the base model.
    Nothing is unpacked before its sizes are known to fit. Raises UserError where they do not.
    """
    masks = {}
    start = 0
    try:
        found = {name: (rows, columns) for name, rows, columns, _, _ in matrices}
        if found != shapes or len(matrices) != len(shapes):
            raise ValueError("its matrices are not those of the base model")
        for name, rows, columns, kept, size in matrices:
            if not (type(kept) is type(size) is int and 0 <= kept <= rows * columns and size >= 0):
                raise ValueError(f"{name} keeps {kept} weights in {size} bytes")
            flat = unpack(payload[start : start + size], rows * columns, kept)
            masks[name] = flat.reshape(rows, columns)  # (numel,) -> (out, in)
            start += size
        if start != len(payload):
            raise ValueError(f"{len(payload)} bytes, expected {start}")
    except (TypeError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a mask of this base model ({error})") from None
    return masks


def read_released(path, shapes):
    """Return {matrix: bool array (out, in)} of a mask that was released with the SMP paper.

    The file holds the bits of all matrices, in the lexicographic order of their names there.
    `shapes` is {matrix: (out, in)}. Raises UserError where the file does not fit them.
    """
    try:
        # mmap_mode: a file that claims a huge size is refused, and not read
        bits = np.unpackbits(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError, MemoryError) as error:
        raise UserError(f"{path}: not a .npy of packed bits ({error})") from None
    total = sum(rows * columns for rows, columns in shapes.values())
    if not total <= bits.size < total + 8:
        needed = f"this model's encoder matrices have {total:,} weights"
        raise UserError(f"{path}: {bits.size:,} bits, but {needed}")
    masks = {}
    start = 0
    for name in sorted(shapes, key=lambda name: f"{name}.mask_scores"):
        rows, columns = shapes[name]
        flat = bits[start : start + rows * columns].astype(bool)
        masks[name] = flat.reshape(rows, columns)  # (numel,) -> (out, in)
        start += rows * columns
    return masks


# ---------- evaluating masks: one base, many tasks ------------------------------------------------


def masked_base(base, device):
    """Return (model, {matrix: MaskedLinear}) of a base model. It keeps all, and trains nothing."""
    Model, _ = read_config(base)
    if "vocabulary" in Model.heads:
        model = load_model(base, "vocabulary", form="vocabulary")
    else:
        model = load_model(base, "words", words=[0])
    model.requires_grad_(False)
    mask_matrices(model, initial=None)
    return model.to(device), masked_linears(model)


def switch(model, linears, masks, words, form):
    """Make the base in memory the model of another task.

    That is done by its masks, its label words (ids), if it has any, and the form of its output
    head. Raises UserError where the base has no head of this form.
    """
    if form not in model.heads:
        raise UserError(f"the base model has heads for {', '.join(model.heads)}, not for {form}")
    model.form = form
    for name, linear in linears.items():
        linear.mask.copy_(torch.from_numpy(masks[name]))
    if words:
        model.words = torch.tensor(words, device=model.words.device)
        model.outputs = len(words)


def read_any_mask(path, base, sha256, shapes, task_name, task_file):
    """Return (what its header says, {matrix: bool array}) of a mask file, ours or a released one.

    Raises UserError where a mask is over another model than `base`, which has this `sha256`, and
    where a released one comes without a task, which it does not name.
    """
    if str(path).endswith(".npy"):
        if not task_name:
            raise UserError(f"{path}: a released mask does not name its task; give --task")
        kind = get_task(task_name, task_file).kind
        length = (COMMON | COMMON_OF_KIND.get(kind, {}))["max_length"]
        about = {"task": task_name, "max_length": length, "dtype": "fp32"}
        return about, read_released(path, shapes)
    about, payload = read_mask(path)
    if about["base_sha256"] != sha256:
        theirs = f"{about['base']} (sha256 {about['base_sha256'][:12]}...)"
        ours = f"{base} is another model (sha256 {sha256[:12]}...)"
        raise UserError(f"{path}: a mask over {theirs}; {ours}")
    return about, unpack_all(path, about["matrices"], payload, shapes)


def evaluate_masks(base, paths, device, data_dir, task_name=None, words=(), task_file=None):
    """Print the metrics on dev of each mask file over `base`; return them."""
    source = find_model(base)
    sha256 = model_sha256(source)
    model, linears = masked_base(source, device)
    tokenizer = load_tokenizer(source, model.config.vocab_size, model.config.framed)
    shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items()}
    found = []
    for path in paths:
        about, masks = read_any_mask(path, base, sha256, shapes, task_name, task_file)
        if "labels" in about:
            if task_name not in (None, about["task"]):
                raise UserError(f"--task {task_name}: {path} is a mask for {about['task']}")
            task = trained_on(path, about | {"task_file": task_file})
        else:  # a released mask does not say what it was trained on
            task = get_task(task_name, task_file)
        length = about["max_length"]
        longest = model.config.positions
        if not 8 <= length <= longest:
            raise UserError(f"{path}: texts of {length} tokens; {base} takes 8 to {longest}")
        label_words = words or about.get("words") or task.words
        outputs = (len(task.labels),) if task.labels else (1, 2)
        if kind_of(task).own_head:
            task = with_settings(task, about.get("settings"), path)
        elif len(label_words) not in outputs:
            counted = f"{len(label_words)} label words: {task.name} has {outputs[-1]}"
            raise UserError(f"{path}: {counted}")
        switch(model, linears, masks, word_ids(tokenizer, label_words), kind_of(task).form)
        dev_sets = load_dev(task, tokenizer, about["max_length"], data_dir)
        metrics = evaluate(model, dev_sets, device, about["dtype"])
        kept, total = count(masks)
        print(f"{path}: {task.name}, density {kept / total:.4f}: {show(metrics)}")
        found.append(metrics)
    return found
