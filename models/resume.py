"""Exact resume: what a run that trains must remember, and its checkpoint.safetensors."""

import json
import time
from dataclasses import asdict, dataclass, fields

import torch

from models.runs import read_run_config
from support.tensors import parse_safetensors, save_tensors
from support.terminal import UserError, as_flag


@dataclass
class Progress:
    """What a run remembers besides tensors; a checkpoint holds it as JSON."""

    step: int = 0  # optimizer steps done
    metrics: dict = None  # of the last evaluation
    best: dict = None  # metrics and step of the best evaluation at the final density
    teacher: float = None  # the metric of the present teacher, which a new one must exceed
    teacher_file: str = None  # the file of its table; None: not written yet
    seconds: float = 0.0  # in all
    eval_seconds: float = 0.0  # of these, in evaluations and with a teacher
    loss_sum: float = 0.0  # since the last log line
    loss_steps: int = 0  # in this sum
    scaler: dict = None  # the state of fp16's GradScaler
    since_best: int = 0  # evaluations at the final density since the best one


def remembered(run):
    """Return {name: tensor} of what checkpoint.safetensors holds besides `Progress`.

    NAME               what is trained, under the model's names
    method.NAME        what the method remembers, see `Dense.state`
    optimizer.I.KEY    what AdamW remembers of parameter I
    """
    tensors = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    tensors |= {f"method.{name}": tensor for name, tensor in run.method.state().items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": tensor for key, tensor in state.items()}
    return tensors


def save_progress(run, step, loss_sum):
    """Write checkpoint.safetensors after `step`; `loss_sum` is that of all ranks. Rank 0 writes."""
    run.progress.step = step
    run.progress.seconds = time.perf_counter() - run.started
    run.progress.loss_sum = loss_sum
    run.progress.scaler = run.scaler.state_dict()
    if run.rank > 0:
        return
    run.teacher.save(run)
    progress = json.dumps(asdict(run.progress))
    save_tensors(run.out / "checkpoint.safetensors", remembered(run), progress=progress)
    for path in run.out.glob("teacher-*.safetensors"):
        if path.name != run.progress.teacher_file:
            path.unlink()  # of the checkpoint before


def load_progress(run, data, path):
    """Put back a checkpoint, the bytes of `path`. UserError where it is damaged or of another run.

    The number of processes may be another than before. The batches stay, dropout does not.
    """
    tensors, header = parse_safetensors(data, path)
    optimizer = run.optimizer.state_dict()
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            optimizer["state"].setdefault(int(i), {})[key] = tensor
    run.optimizer.load_state_dict(optimizer)
    ours = remembered(run)
    if ours.keys() != tensors.keys() or "progress" not in header:
        raise UserError(f"{path}: of another model or method; start anew in another --out")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(tensors[name])
    run.progress = Progress(**json.loads(header["progress"]))
    run.scaler.load_state_dict(run.progress.scaler)
    run.teacher.load(run)


# What may be given anew: where something lies now. `check_resumed` compares what it holds.
MAY_CHANGE = ("resume", "out", "device", "data_dir", "model", "task_file", "from_run")


# The settings that older runs do not have.
NEWER = ("patience", "label_smoothing", "beams", "length_penalty", "no_repeat_ngram")
NEWER += ("max_new_tokens", "eval_sources", "frozen_dtype")


def resumed(given, out, Settings):
    """Return {setting: value} of the run in `out`, which goes on.

    Raises UserError where a flag in `given` contradicts them.
    """
    path = out / "config.json"
    config = read_run_config(out)
    newer = {name: getattr(Settings, name) for name in NEWER}
    saved = newer | config["settings"]
    if saved.keys() != {f.name for f in fields(Settings)}:
        raise UserError(f"{path}: not the settings of a run of this version of train.py")
    for name, value in given.items():
        may_change = name in MAY_CHANGE and saved[name] is not None
        if value != saved[name] and not may_change:
            raise UserError(f"{as_flag(name)} {value}: {path} was started with {saved[name]}")
    if saved["task_file"] and (out / "task.json").is_file():
        saved["task_file"] = str(out / "task.json")
    return saved | given | {"out": str(out), "dtype": config["dtype"]}  # no "auto"
