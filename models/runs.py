"""Run folders: what config.json of a run says, and its model."""

from dataclasses import asdict
from pathlib import Path

import torch

from data import get_task, kind_of
from models.checkpoint import baked_state, load_model, model_sha256, read_safetensors
from models.checkpoint import save_model, save_tensors
from models.tokenizer import load_tokenizer
from prune import METHODS
from support.files import read_json
from support.machine import peak_memory, surroundings
from support.terminal import UserError


def describe(run):
    """Return what config.json of a run folder holds."""
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    return {
        "settings": asdict(run.settings),
        "labels": list(run.task.labels),
        "kind": run.task.kind,
        "outputs": run.model.outputs,
        "output_head": run.model.output_head,
        "words": run.words,
        "only_scores": all(name.endswith(".scores") for name in trained),
        "command": run.command,
        "model_sha256": model_sha256(run.source),
        "dtype": run.dtype,
        "device": str(run.device),
        "world_size": run.world,
        **surroundings(),
    }


def describe_result(run):
    """Return what result.json of a finished run holds."""
    s = run.settings
    return {
        "task": s.task,
        "model": s.model,
        "method": s.method,
        "density": s.density,
        "achieved_density": run.method.achieved(),
        "metrics": run.progress.metrics,
        "best": run.progress.best,
        "seed": s.seed,
        "steps": run.total_steps,
        "epochs": round(run.total_steps / run.steps_per_epoch, 3),
        "train_seconds": round(run.progress.seconds, 2),
        "examples_per_second": round(run.speed(run.total_steps), 2),
        "peak_memory_bytes": peak_memory(run.device),
        "command": run.command,
    }


def write_model(run, name):
    """Write the model with its masks applied into the folder `name` of the run."""
    if run.rank == 0:
        state = baked_state(run.model)
        save_model(run.out / name, run.model, state, run.source, run.task.labels)


def write_scores(run, folder):
    """Write the scores and masks, if there are any, into `folder`."""
    tensors = run.method.tensors()
    if tensors and run.rank == 0:
        save_tensors(folder / "scores.safetensors", tensors, format="pt")


def read_run_config(run):
    """Return what config.json of a run folder holds; UserError where the folder is no run."""
    path = Path(run) / "config.json"
    config = read_json(path)
    settings = config.get("settings")
    if not isinstance(settings, dict) or "method" not in settings:
        raise UserError(f"{path}: not the settings of a run of train.py")
    return config


def output_head_of(config):
    """Return "classifier" or "words", or None where a run's config does not say it."""
    method = config["settings"]["method"]
    if method in list(METHODS) and METHODS[method].output_head:
        return METHODS[method].output_head
    head = config.get("output_head")
    return head if head in ("classifier", "words") else None


def load_run(run, which="model"):
    """Return (model, task, tokenizer, settings) of a run; `which` is "model" or "best".

    "model" is the last step, "best" the best checkpoint on dev. The settings hold the rest of
    config.json, too. Raises UserError where the run is not finished, or where its task has changed
    since.
    """
    run = Path(run)
    config = read_run_config(run)
    settings = config | config["settings"]
    needed = {"labels", "outputs", "words", "task", "task_file", "max_length", "density"}
    head = output_head_of(config)
    if head is None or "dtype" not in config or not settings.keys() >= needed:
        raise UserError(f"{run}/config.json: not the settings of a run of train.py")
    settings["dtype"] = config["dtype"]  # what "auto" was
    folder = run / which
    if not folder.is_dir():
        raise UserError(f"{run}: has no {which}/ yet; continue the run with --resume")
    task = trained_on(run, settings)
    tokenizer = load_tokenizer(folder, read_json(folder / "config.json").get("vocab_size", 0))
    form = kind_of(task).form
    outputs, words = config["outputs"], config["words"]
    model = load_model(folder, head, outputs, words, new_head=False, form=form)
    return model, task, tokenizer, settings


def trained_on(path, about):
    """Return the task that `about` describes by its "task", "task_file" and "labels".

    `about` is what `path` says of its training. Raises UserError where the task file, which may
    have changed since, describes another task or other labels.
    """
    name = None if about["task_file"] else about["task"]
    task = get_task(name, about["task_file"])
    kind = about.get("kind", task.kind)  # older runs do not say it
    then = f"{about['task']} ({kind}) with labels {about['labels']}"
    if then != described(task):
        raise UserError(f"{path}: trained on {then}; the task file describes {described(task)}")
    return task


def described(task):
    """Return a task as messages name it."""
    return f"{task.name} ({task.kind}) with labels {list(task.labels)}"


def read_origin(s, source):
    """Return (model, task, tokenizer, settings) of the run to start from.

    Raises UserError where it is not finished, or of another model or method.
    """
    origin = load_run(s.from_run)
    theirs = origin[-1]
    if theirs["model_sha256"] != model_sha256(source):
        raise UserError(f"--from {s.from_run}: began with another model than {s.model}")
    if theirs["method"] != s.method and METHODS[s.method].output_head is not None:
        expected = f"expected {s.method}, or fixed"
        raise UserError(f"--from {s.from_run}: a {theirs['method']} run; {expected}")
    return origin


def begin_from(run, origin):
    """Give a run what a finished one has learned, but not its output head for other labels."""
    model, task, _, _ = origin
    tensors = model.state_dict()
    if run.method.masks:
        tensors |= read_safetensors(Path(run.settings.from_run, "checkpoint.safetensors"))[0]
    same = described(task) == described(run.task)
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if name in tensors and (same or not name.startswith(run.model.head_name)):
                p.copy_(tensors[name])
