"""Run folders: what config.json of a run says, and its model."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data import Task, get_task, kind_of, read_split, with_settings
from models.checkpoint import DROPOUTS, baked_state, load_model, model_sha256, read_config
from models.checkpoint import save_model
from models.tokenizer import load_tokenizer, save_tokenizer, unknown_id
from prune import METHODS, masked_linears
from support.fetch import find_model, locate
from support.files import read_json, read_optional, sha256_of, write_json
from support.machine import peak_memory, surroundings
from support.matrices import encoder_linears
from support.tensors import read_safetensors, save_tensors
from support.terminal import UserError, quote, warn

# ---------- what a run writes ---------------------------------------------------------------------


def describe(run):
    """Return what config.json of a run folder holds."""
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    began = began_with(run)
    return {
        "settings": asdict(run.settings),
        "began_with": began,
        "labels": list(run.task.labels),
        "kind": run.task.kind,
        "outputs": run.model.outputs,
        "output_head": run.model.output_head,
        "words": run.words,
        "only_scores": all(name.endswith(".scores") for name in trained),
        "command": run.command,
        "model_sha256": began["sha256_of_model"],
        "source": str(Path(run.source).resolve()),
        "dtype": run.dtype,
        "device": str(run.device),
        "world_size": run.world,
        **surroundings(),
    }


def began_with(run):
    """Return {name: value} of all, besides the settings, on which the steps of a run depend."""
    s = run.settings
    found = {"sha256_of_model": model_sha256(run.source)}
    if s.from_run:
        folder = Path(s.from_run, "model") if is_run(s.from_run) else s.from_run
        found["sha256_of_from"] = model_sha256(folder)
    found |= {f"config_{name}": v for name, v in function_of(run.model.config).items()}
    for split in ("train", *run.task.eval_splits):
        found[f"sha256_of_{split}"] = sha256_of(locate(run.task, split, s.data_dir))
    found["sha256_of_tokens"] = hashlib.sha256(run.train_set.ids).hexdigest()
    for name, value in asdict(run.task).items():
        if name not in ("files", "folder"):  # a file may be moved
            found[f"task_{name}"] = value
    return json.loads(json.dumps(found))


def check_resumed(run):
    """Raise UserError where a run would go on with another model, other data or another task."""
    config = read_run_config(run.out)
    then = {"sha256_of_model": config["model_sha256"]} | config.get("began_with", {})
    for name, value in began_with(run).items():
        if then.get(name, value) != value:
            told = f"{name} is {quote(value)}, but was {quote(then[name])}"
            advice = "give back what it was, or start a new run"
            raise UserError(f"--resume: {run.out} began with something else: {told}; {advice}")


def write_task(run):
    """Write task.json, by which the run folder describes a task of your own without other files."""
    path = run.settings.task_file
    if path and run.rank == 0:
        row = read_json(path) | run.task.files  # whole paths
        if "labels" in run.kind.keys:  # which may have come from the training file
            row["labels"] = list(run.task.labels)
        write_json(run.out / "task.json", row)


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
        "steps": run.progress.step,
        "epochs": round(run.progress.step / run.steps_per_epoch, 3),
        "train_seconds": round(run.progress.seconds, 2),
        "examples_per_second": round(run.speed(run.progress.step), 2),
        "peak_memory_bytes": peak_memory(run.device),
        "command": run.command,
    }


def write_model(run, name):
    """Write the model with its masks applied into the folder `name` of the run."""
    if run.rank == 0:
        state = baked_state(run.model)
        save_folder(run.out / name, run.model, state, run.task, run.tokenizer)


def save_folder(folder, model, state, task, tokenizer, labels=None, hub_class=None):
    """Write all that `transformers` loads of a model, see `save_model`."""
    kind = kind_of(task)
    save_model(folder, model, state, task.labels if labels is None else labels, hub_class)
    save_tokenizer(folder, kind.tokenizer(tokenizer), model.config)
    for name, value in kind.further_files(tokenizer).items():
        write_json(folder / name, value)


def write_scores(run, folder):
    """Write the scores and masks, if there are any, into `folder`."""
    tensors = run.method.tensors()
    if tensors and run.rank == 0:
        save_tensors(folder / "scores.safetensors", tensors, format="pt")


# ---------- to read a run -------------------------------------------------------------------------


def read_run_config(run):
    """Return what config.json of a run folder holds; UserError where the folder is no run."""
    path = Path(run) / "config.json"
    config = read_optional(path)
    settings = config.get("settings")
    if not isinstance(settings, dict) or "method" not in settings:
        others = "`python -m tools.deploy evaluate` reads compact folders and ONNX files"
        raise UserError(f"{path}: not the settings of a run; give the folder of a run; {others}")
    return config


def output_head_of(config):
    """Return the output head of a run, or None where its config does not say it."""
    head = config.get("output_head")
    if head in ("classifier", "words", "vocabulary"):
        return head
    method = config["settings"]["method"]  # older runs do not say it
    return METHODS[method].output_head if method in list(METHODS) else None


def source_of(s, run=None):
    """Return the folder of the model that a run begins with. The folder `run` remembers it."""
    path = Path(run or "", "config.json")
    if run and path.is_file() and not Path(s.model).is_dir():
        folder = read_json(path).get("source", "")  # the current folder may be another now
        if Path(folder).is_dir():
            return Path(folder)
    return find_model(s.model)


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
    task = with_settings(trained_on(run, settings), settings, run)
    _, about = read_config(folder)
    tokenizer = load_tokenizer(folder, about.vocab_size, about.framed)
    form = kind_of(task).form
    outputs, words = config["outputs"], config["words"]
    model = load_model(folder, head, outputs, words, new_head=False, form=form)
    return model, task, tokenizer, settings


def trained_on(path, about):
    """Return the task that `about` describes, which is what `path` says of its training.

    A task of your own is described by task.json in the folder `path`. Older folders have only the
    name of the task file. Raises UserError where this now describes another task or other labels.
    """
    whole = Path(path) / "task.json"
    task_file = whole if whole.is_file() else about["task_file"]
    task = get_task(None if task_file else about["task"], task_file)
    then = (about["task"], about.get("kind", task.kind), about["labels"])  # or without a kind
    if then != name_of(task):
        told = f"trained on {described(*then)}"
        raise UserError(f"{path}: {told}; the task file describes {described(*name_of(task))}")
    return task


def name_of(task):
    """Return what a run must share with another one to be on the same task."""
    return task.name, task.kind, list(task.labels)


def described(name, kind, labels):
    """Return a task as messages name it."""
    return f"{name} ({kind}) with labels {quote(labels)}"


# ---------- to begin from a finished run, or from a folder in Hugging Face's layout ---------------


@dataclass
class Origin:
    """What a run starts from, see --from."""

    model: torch.nn.Module
    task: Task
    density: float  # at which the ramp starts
    checkpoint: Path | None  # of a run: what it has trained, before the mask; None: a folder


def read_origin(run):
    """Return the Origin of a run; UserError where it is not finished, or does not fit the run."""
    s = run.settings
    place = f"--from {s.from_run}"
    Method = METHODS[s.method]
    needs = Method.output_head
    if is_run(s.from_run):
        model, task, tokenizer, theirs = load_run(s.from_run)
        if theirs["model_sha256"] != model_sha256(run.source):
            raise UserError(f"{place}: began with another model than {s.model}")
        if theirs["method"] != s.method and needs is not None:
            raise UserError(f"{place}: a {theirs['method']} run; expected {s.method}, or fixed")
        density = read_json(Path(s.from_run, "result.json"))["achieved_density"]
        checkpoint = Path(s.from_run, "checkpoint.safetensors")
    else:
        if needs == "words":
            raise UserError(f"{place}: not a run; {s.method} goes on from its own runs alone")
        model, tokenizer = load_folder(s.from_run, run.task, s.seed)
        task, checkpoint = run.task, None
        has_scores = getattr(Method, "initial", None) is not None
        density = 1.0 if has_scores else density_of(model)  # new scores do not know what is 0
    check_vocabulary(place, tokenizer, run)
    if function_of(model.config) != function_of(read_config(run.source)[1]):
        raise UserError(f"{place}: the config.json of its model differs from that of {s.model}")
    return Origin(model, task, density, checkpoint)


def function_of(config):
    """Return what config.json says of the function of a model, all but its dropout."""
    return {name: value for name, value in vars(config).items() if not name.endswith(DROPOUTS)}


def density_of(model):
    """Return the fraction of the weights of the encoder's matrices that are not 0."""
    weights = [linear.weight for linear in encoder_linears(model)]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def begin_from(run, origin):
    """Give a run what its origin has learned, but not its output head for other labels."""
    tensors = origin.model.state_dict()
    if run.method.masks and origin.checkpoint:
        tensors = before_masks(origin.model, origin.checkpoint, run.model)
    # a kind with an output head of its own trains none for a task
    same = run.kind.own_head or name_of(origin.task) == name_of(run.task)
    if same and run.words and origin.model.words.tolist() != run.words:
        advice = 'with other label words; check --regression, and "words" in the task file'
        raise UserError(f"--from {run.settings.from_run}: was trained {advice}")
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if name in tensors and (same or not name.startswith(run.model.head_name)):
                p.copy_(tensors[name])


def before_masks(baked, checkpoint, masked):
    """Return {name: tensor} of what a run has trained, before its masks, and of what was frozen.

    `baked` is its model with the masks applied, and `masked` one with masks. The weights that SMP
    never trains are not among the tensors: they are those of the base.
    """
    tensors = baked.state_dict()
    for name in masked_linears(masked):
        del tensors[f"{name}.weight"]
    return tensors | read_safetensors(checkpoint)[0]


def is_run(folder):
    """Is this the folder of a run? Else it may be a model in Hugging Face's layout."""
    config = read_json(Path(folder) / "config.json")
    return "settings" in config or "model_type" not in config


def load_folder(folder, task, seed=None):
    """Return (model, tokenizer) of a fine-tuned model in Hugging Face's layout.

    Its output head is put into the order of the task's labels. Where it is for other labels, a new
    one is drawn with `seed`; without a seed that is a UserError.
    """
    _, config = read_config(folder)
    kind = kind_of(task)
    options = {"seed": seed or 0, "new_head": seed is not None, "form": kind.form}
    options |= {"outputs": len(kind.outputs), "labels": kind.outputs}
    model = load_model(folder, kind.own_head or "classifier", **options)
    return model, load_tokenizer(folder, config.vocab_size, config.framed)


def check_vocabulary(place, tokenizer, run):
    """Raise UserError unless a tokenizer has the tokens of the run's own."""
    if tokenizer.get_vocab() != run.tokenizer.get_vocab():
        raise UserError(f"{place}: its vocabulary differs from that of {run.settings.model}")


# ---------- a warning -----------------------------------------------------------------------------


def warn_of_unknown(run):
    """Say where more than a fifth of the training tokens are unknown to the tokenizer."""
    unknown = unknown_id(run.tokenizer)
    share = float(np.mean(run.train_set.ids == unknown))
    if share <= 0.2:
        return
    path = locate(run.task, "train", run.settings.data_dir)
    texts, _ = read_split(run.task, "train", path, path.read_bytes())
    found = Counter()
    for text in texts[:1000]:
        for part in [text] if isinstance(text, str) else text:
            encoding = run.tokenizer.encode(part, add_special_tokens=False)
            spans = zip(encoding.ids, encoding.offsets)
            found.update(part[a:b] for token, (a, b) in spans if token == unknown)
    most = quote(" ".join(text for text, _ in found.most_common(10)))
    name = run.tokenizer.id_to_token(unknown)
    told = f"{share:.1%} of the training tokens are {name}, most often {most}"
    warn(f"{told}; {run.settings.model} does not know this language")
