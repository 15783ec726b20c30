"""A model as a file for ONNX Runtime: written, quantised to int8, read again.

`python -m tools.deploy onnx` writes such files. Their metadata hold all that a prediction needs
besides:

- "tokenizer": a tokenizer.json that cuts a text at the run's maximum length, and pads it.
- "nanoprune": JSON with the task, its labels and label words.
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

from data import Task, get_task, with_settings
from kinds.task_file import task_fields
from support.files import atomic_write
from support.terminal import UserError
from tools.record import check_values

PACKAGES = "onnx onnxruntime onnxscript"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# The version of ONNX's operators. From 23 on attention is one of them, and ONNX Runtime 1.32 fails
# on ours: its mask is (B, 1, 1, T), and the quantised operator is invalid.
OPSET = 20
ABOUT = {"task": str, "task_file": dict, "labels": list, "label_words": list}
ABOUT |= {"max_length": int, "settings": dict}


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


# Two operators are exported in a form of our own. ONNX Runtime joins a norm with the sum before it,
# and the joint operator is slow on a CPU. It took a fifth of the time of a dense MiniLM in int8. Of
# one with a quarter of the weights it took half. The exporter's attention looks for rows without a
# token, which do not occur. The exporter passes no argument that has torch's default.


def layer_norm(x, shape, weight, bias, eps=1e-5, cudnn_enable=True):
    """Return torch's layer_norm in ONNX, where nothing can be joined with it."""
    from onnxscript import opset20 as op

    return op.LayerNormalization(op.Sum(x), weight, bias, axis=-1, epsilon=eps)[0]


def attention(q, k, v, mask, dropout=0.0, *, scale):
    """Return torch's scaled_dot_product_attention in ONNX, for a mask of booleans."""
    from onnxscript import opset20 as op

    hidden = op.Mul(op.Sub(op.Cast(mask, to=1), 1.0), 1e9)  # 0 where the mask is set, else -1e9
    scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), scale)
    return op.MatMul(op.Softmax(op.Add(scores, hidden), axis=-1), v)


OURS = {
    torch.ops.aten.layer_norm.default: layer_norm,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}


def to_onnx(model, operators=OURS):
    """Return the bytes of a model in float32 as an ONNX file, for any batch and length.

    `operators` are exported in another way than torch's. Raises UserError for a decoder.
    """
    packages()
    if model.output_head == "vocabulary":
        raise UserError("onnx: not offered for a decoder; export writes its model")
    most = model.config.positions
    sizes = {0: torch.export.Dim("batch", max=2**16), 1: torch.export.Dim("length", max=most)}
    # Each input is a tensor of its own. The exporter would take one tensor for one input.
    example = {name: torch.ones(2, 8, dtype=torch.long) for name in INPUTS}
    options = {"kwargs": example, "dynamo": True, "verbose": False}
    options |= {"dynamic_shapes": dict.fromkeys(INPUTS, sizes)}
    options |= {"input_names": INPUTS, "output_names": ["logits"], "opset_version": OPSET}
    options |= {"custom_translation_table": operators}
    with quiet():
        program = torch.onnx.export(model.cpu().eval(), (), **options)
    return program.model_proto.SerializeToString()


def in_int8(data):
    """Return the bytes of an ONNX file with matrices in int8, each row with a scale of its own.

    ONNX Runtime quantises the other factor of each product when it computes it. The matrices use 7
    of the 8 bits. With 8 the sum of two products overflows on a CPU without VNNI. The logits of two
    BERT-tiny were then off by 0.16 and 0.18 in the mean, and with 7 bits by 0.03 and 0.05. Unsigned
    matrices of 8 bits are exact there, too, but slower: 1.15 times with MiniLM, 8 x 64 tokens.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
    with tempfile.TemporaryDirectory() as folder, quiet():
        before, after = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        before.write_bytes(data)
        quantize_dynamic(before, after, **options)
        return after.read_bytes()


def save_onnx(path, data, model, task, tokenizer, settings, task_file):
    """Write an ONNX file of `model` with all that a prediction needs.

    `settings` are those of the run. `task_file` is the object in its task.json, or an empty one.
    """
    onnx, _ = packages()
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy
    tokenizer.enable_truncation(settings["max_length"])
    tokenizer.enable_padding(pad_id=model.config.pad_token_id)
    about = {"task": task.name, "task_file": task_file, "labels": list(task.labels)}
    about |= {"label_words": list(task.words), "max_length": settings["max_length"]}
    about |= {"settings": task.settings}
    texts = {"nanoprune": json.dumps(about), "tokenizer": tokenizer.to_str()}
    file = onnx.load_from_string(data)
    onnx.helper.set_model_props(file, texts)
    atomic_write(path, file.SerializeToString())


# ---------- reading -------------------------------------------------------------------------------


class OnnxModel(nn.Module):
    """An ONNX file that is called like the model of which it was made."""

    def __init__(self, data, path="the ONNX file"):
        super().__init__()
        _, runtime = packages()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors alone
        # Threads that wait for work shall sleep. Else they slow down whatever is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            providers = ["CPUExecutionProvider"]
            self.session = runtime.InferenceSession(data, options, providers=providers)
        except Exception as error:  # the library raises many kinds of them
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{path}: not a whole ONNX file ({reason}); write it again") from None
        self.outputs = self.session.get_outputs()[0].shape[-1]

    def forward(self, **tensors):
        values = {name: tensor.long().cpu().numpy() for name, tensor in tensors.items()}
        (logits,) = self.session.run(["logits"], values)
        return torch.from_numpy(logits).to(tensors["input_ids"].device)


def load_onnx(path):
    """Return (model, task, tokenizer, settings) of a file of `save_onnx`, as `load_run` of a run.

    Raises UserError where it is damaged, or of another program.
    """
    model = OnnxModel(Path(path).read_bytes(), path)
    texts = model.session.get_modelmeta().custom_metadata_map
    try:
        about = dict(json.loads(texts["nanoprune"]))
        tokenizer = Tokenizer.from_str(texts["tokenizer"])
    except Exception as error:  # the library raises bare Exceptions
        told = f"no metadata of nanoprune ({error})"
        raise UserError(f"{path}: {told}; expected a file of `deploy onnx`") from None
    check_values(path, about, ABOUT)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    own = about["task_file"]
    task = Task(**task_fields(own, Path(path))) if own else get_task(about["task"])
    task = with_settings(task, about["settings"], path)
    return model, task, tokenizer, {"max_length": about["max_length"], "dtype": "fp32"}
