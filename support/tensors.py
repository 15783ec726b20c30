"""Files of tensors, in the form safetensors."""

import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_safetensors

from support.files import atomic_write
from support.terminal import UserError

# The names of data types in a safetensors file.
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NAMES |= {torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}


def read_safetensors(path):
    """Return ({name: tensor}, metadata) of a safetensors file; UserError if missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None


def parse_safetensors(data, path):
    """Return ({name: tensor}, metadata) of `data`, the bytes of a checkpoint at `path`."""
    try:
        tensors = from_safetensors(data)
    except SafetensorError as error:
        lost = "the run cannot be resumed; its best model so far, if any, is in best/"
        raise UserError(f"{path}: damaged ({error}); {lost}") from None
    size = int.from_bytes(data[:8], "little")  # of the header
    return tensors, json.loads(data[8 : 8 + size]).get("__metadata__", {})


def save_tensors(path, tensors, **metadata):
    """Write {name: tensor} as a safetensors file."""
    atomic_write(path, as_safetensors(tensors, metadata))


def as_safetensors(tensors, metadata):
    """Yield the parts of a safetensors file: its header, then one tensor after another.

    The package safetensors makes two copies of all tensors, which here would double the memory that
    a run needs.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so all are aligned
    header = {"__metadata__": metadata}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        about = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = about | {"data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
