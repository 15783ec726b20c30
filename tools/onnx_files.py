"""A model as a file for ONNX Runtime: written, quantised to int8, read again.

`python -m tools.deploy onnx` writes such files. Their metadata hold all that a prediction needs
besides: the tokenizer, the task, its labels and label words.
"""

import contextlib
import json
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from data import get_task, with_settings
from support.files import atomic_write, read_optional
from support.terminal import UserError

PACKAGES = "onnx onnxruntime onnxscript"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def packages():
    """Return (onnx, onnxruntime); UserError where one of the packages is not installed."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch exports with it)
    except ImportError as error:
        needed = f"pip install {PACKAGES}"
        raise UserError(f"ONNX files need packages that are not installed: {needed}") from error
    return onnx, onnxruntime


# ---------- writing -------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet():
    """Keep the log and the warnings of torch's exporter away from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def to_onnx(model):
    """Return the bytes of a model in float32 as an ONNX file, for any batch and length."""
    onnx, _ = packages()
    most = model.config.positions
    sizes = {0: torch.export.Dim("batch", max=2**16), 1: torch.export.Dim("length", max=most)}
    example = {name: torch.ones(2, 8, dtype=torch.long) for name in INPUTS}  # not one tensor
    options = {"kwargs": example, "dynamo": True, "verbose": False}
    options |= {"dynamic_shapes": dict.fromkeys(INPUTS, sizes)}
    options |= {"input_names": INPUTS, "output_names": ["logits"]}
    with quiet():
        program = torch.onnx.export(model.cpu().eval(), (), **options)
    return program.model_proto.SerializeToString()


def in_int8(data):
    """Return the bytes of an ONNX file with quantised matrices, each row by a scale of its own.

    ONNX Runtime quantises what they are multiplied by in each product.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
        before, after = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        before.write_bytes(data)
        quantize_dynamic(before, after, weight_type=QuantType.QInt8, per_channel=True)
        return after.read_bytes()


def with_metadata(data, **texts):
    """Return the bytes of an ONNX file with metadata {name: text}."""
    onnx, _ = packages()
    model = onnx.load_from_string(data)
    onnx.helper.set_model_props(model, texts)
    return model.SerializeToString()


def save_onnx(path, data, task, tokenizer, settings, task_file):
    """Write an ONNX file with all that a prediction needs.

    `settings` are those of the run, and `task_file` is its task.json, which may be missing.
    """
    about = {"task": task.name, "kind": task.kind, "labels": list(task.labels)}
    about |= {"label_words": list(task.words), "settings": task.settings}
    about |= {"max_length": settings["max_length"], "outputs": settings["outputs"]}
    about["task_file"] = read_optional(task_file)
    texts = {"nanoprune": json.dumps(about), "tokenizer": tokenizer.to_str()}
    atomic_write(path, with_metadata(data, **texts))


# ---------- reading -------------------------------------------------------------------------------


class OnnxModel(nn.Module):
    """An ONNX file that is called like the model that it was made of."""

    def __init__(self, data, path="the file", threads=None):
        super().__init__()
        _, runtime = packages()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3  # errors alone
        try:
            cpu = ["CPUExecutionProvider"]
            self.session = runtime.InferenceSession(data, options, providers=cpu)
        except Exception as error:  # the library raises many kinds of them
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{path}: not a whole ONNX file ({reason}); write it again") from None
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        self.outputs = None  # the number of outputs

    def forward(self, **tensors):
        inputs = {name: tensor.long().cpu().numpy() for name, tensor in tensors.items()}
        (logits,) = self.session.run(["logits"], inputs)
        return torch.from_numpy(logits).to(tensors["input_ids"].device)


def load_onnx(path):
    """Return (model, task, tokenizer, settings) of a file of `save_onnx`, as `load_run` of a run.

    Raises UserError where it is damaged, or of another program.
    """
    model = OnnxModel(Path(path).read_bytes(), path)
    if not model.metadata.keys() >= {"nanoprune", "tokenizer"}:
        raise UserError(f"{path}: no metadata of nanoprune; expected a file of `deploy onnx`")
    about = json.loads(model.metadata["nanoprune"])
    tokenizer = Tokenizer.from_str(model.metadata["tokenizer"])
    model.outputs = about["outputs"]
    own = None
    with tempfile.TemporaryDirectory() as folder:
        if about["task_file"]:
            own = Path(folder, "task.json")
            own.write_text(json.dumps(about["task_file"]))
        task = get_task(None if own else about["task"], own)
    task = with_settings(task, about["settings"], path)
    return model, task, tokenizer, {"max_length": about["max_length"], "dtype": "fp32"}
