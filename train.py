"""Fine-tune and prune BERT on a GLUE task: a plain loop.

    python train.py                                                   the embedded demo: dense, then SMP-S at 10%
    python train.py --model google-bert/bert-base-uncased --task mnli --method smp-s --density 0.10 --out runs/mnli
    torchrun --nproc-per-node 4 train.py ...                          the same on four devices

A run is a pure function of its settings: the order of the data is drawn from (seed, epoch), dropout from (seed, step,
rank), so that an interrupted run continues bit-exactly from (parameters, optimizer moments, step).
"""

import argparse
import contextlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors
from torch.nn.parallel import DistributedDataParallel

from data import TASKS, Parser, UserError, atomic_write, batches, collate, get_task, load_dataset, load_tokenizer
from data import program, word_ids
from eval import autocast, evaluate, inputs, load_dev, load_run, pick_device, predict, send, show
from model import find_model, load_model, model_sha256, read_config, read_json, read_safetensors, save_model
from model import task_loss, to_score
from prune import METHODS, TIED, baked_state, distill, n_of_m, self_distill

# ---------------------------------------------------------------------------------------------------------------------
# settings


def flag(default, within, text, group=None):
    """A field of Settings that becomes a flag. `within`: the interval of a number, or the choices of a word; `group`
    opens a new heading in --help."""
    return field(default=default, metadata={"within": within, "help": text, "group": group})


@dataclass
class Settings:
    """Everything a run depends on. None: taken from RECIPES for the method and task."""

    model: str = flag("demo", None, "Hugging Face id, folder in Hugging Face's layout, or demo", "what to train")
    task: str = flag("demo", None, f"one of {' '.join(name for name in TASKS if name != 'ax')}")
    task_file: str = flag(None, None, "your own task: a JSON file, see README")
    method: str = flag("smp-s", tuple(METHODS), "how to prune")
    density: float = flag(None, "(0, 1]", "fraction kept; recipe 0.1, pins 0.2, l0 and soft-movement by lambda")
    out: str = flag(None, None, "run folder; default runs/TASK-METHOD-DENSITY-sSEED")
    resume: bool = flag(False, None, "continue the run in --out, bit-exactly, from its last checkpoint")

    data_dir: str = flag("data", None, "folder of the GLUE files; what is missing is downloaded there", "data")
    max_length: int = flag(None, "[8, inf)", "tokens with [CLS] and [SEP]; longer pairs are cut; recipe 128 (SMP code)")

    epochs: int = flag(None, "[1, inf)", "passes over the training set; recipe by task", "optimisation")
    max_steps: int = flag(0, "[0, inf)", "optimizer steps of the whole run in place of epochs; 0: by epochs")
    batch_size: int = flag(None, "[1, inf)", "examples per step, over all devices and micro-batches; recipe by task")
    max_tokens: int = flag(0, "[0, inf)", "in place of --batch-size, tokens per step, padding included; 0: off")
    grad_accum: int = flag(1, "[1, inf)", "micro-batches a batch is computed in: less memory, same result")
    lr: float = flag(None, "[0, inf)", "peak learning rate of the weights; recipe 3e-5 (Devlin et al. A.3)")
    warmup: float = flag(None, "[0, 1]", "fraction of the run in which lr rises; recipe by method")
    weight_decay: float = flag(None, "[0, inf)", "AdamW's, on matrices only; recipe dense 0.01 (Devlin), else 0")
    clip: float = flag(1.0, "(0, inf)", "largest gradient norm (SMP code; Devlin et al. code)")
    dropout: float = flag(None, "[0, 1)", "probability, hidden and attention; recipe 0.1, as in pretraining")
    seed: int = flag(0, "[0, 2147483647]", "of the new head, the order of the data and dropout")

    pattern: str = flag(
        "weight", None,
        "kept as one: a weight; a unit (FFN: a row of U with its column of D; attention by weight); a head (its rows "
        "of Q, K, V and columns of O; FFN by unit); n:m, as 2:4: of every m inputs n, density n/m", "pruning",
    )  # fmt: skip
    score_lr: float = flag(None, "[0, inf)", "peak learning rate of the scores; recipe by method")
    hold: float = flag(None, "[0, 1)", "fraction of the run at density 1, before the ramp; recipe by method")
    ramp: float = flag(None, "(0, 1]", "fraction of the run in which density falls; recipe by method")
    reg_lambda: float = flag(None, "[0, inf)", "final weight of the regulariser; recipe 400, l0 125")
    temperature_s: float = flag(None, "(0, inf)", "p in SMP-S's sigmoid(S/p); recipe 1, 3 or 4 by density (SMP code)")
    redistribute: bool = flag(True, None, "SMP-S: pass on what a full matrix cannot take; --no-...: as released")
    pins_score: str = flag("absolute", ("absolute", "signed"), "PINS: rank |I| (PINS code) or I (PINS paper)")
    pins_window: int = flag(10, "[1, inf)", "PINS: steps averaged, and between rankings in the ramp (PINS code)")
    beta1: float = flag(None, "[0, 1)", "PINS: decay of the importance's average; recipe 0.85, sensitivity 0")
    beta2: float = flag(0.99, "[0, 1)", "PINS: decay of the uncertainty's average (PINS code on RTE)")
    regression: str = flag(
        "interpolate", ("interpolate", "logit"),
        'score tasks with label words: p(yes) against "no", or the published logit of "yes" under MSE',
    )
    teacher: str = flag(
        None, None,
        "dense run of the task to distil from; self: this run's own best checkpoint so far; self:RUN: the same, from a "
        "dense run on; none; recipe pins self (PINS), else none",
    )
    teacher_split: float = flag(0.0, "[0, 0.5]", "fraction of train held out to choose self's teacher on; 0: on dev")

    eval_every: int = flag(0, "[0, inf)", "steps between evaluations, each with a checkpoint; 0: per epoch", "running")
    log_every: int = flag(50, "[1, inf)", "steps between log lines")
    device: str = flag("auto", ("auto", "cpu", "cuda", "mps"), "where to run")
    dtype: str = flag(
        None, ("auto", "fp32", "bf16", "fp16"), "autocast; recipe auto: bf16 where the device computes in it, demo fp32"
    )


# The published recipes, by method and then by task ("*": every other). Fractions of a run are the published steps over
# the steps of the run they were published for.
_COMMON = {"max_length": 128, "dropout": 0.1, "lr": 3e-5, "weight_decay": 0.0, "warmup": 0.0, "hold": 0.0}
_COMMON |= {"beta1": 0.85, "dtype": "auto", "density": 0.1, "teacher": "none", "score_lr": 0.0, "reg_lambda": 0.0}
# a language of short sentences, a model pretrained without dropout and too small for bf16 to be faster
_DEMO = {"max_length": 32, "dropout": 0.0, "dtype": "fp32"}
# Devlin et al. A.2, A.3; five epochs for the small tasks as in the GLUE examples of `transformers`
_DENSE = _COMMON | {"density": 1.0, "epochs": 3, "batch_size": 32, "warmup": 0.1, "weight_decay": 0.01}
_DENSE_TASKS = {"*": _DENSE, "demo": _DENSE | _DEMO | {"lr": 5e-4}}
_DENSE_TASKS |= {t: _DENSE | {"epochs": 5} for t in ("mrpc", "rte", "wnli")}
# released run scripts of SMP
_SMP = _COMMON | {"epochs": 60, "batch_size": 32, "score_lr": 2e-2, "reg_lambda": 400.0}
_SMP_TASKS = {"*": _SMP, "rte": _SMP | {"epochs": 100}}
_SMP_TASKS |= {t: _SMP | {"epochs": 12, "batch_size": 64} for t in ("mnli", "qnli", "qqp", "sst2")}
_SMP_TASKS["demo"] = _SMP | _DEMO | {"epochs": 10, "batch_size": 64, "reg_lambda": 200.0}
# movement pruning's recipe on SQuAD: 10 epochs of 5,540 steps of 16; 5,400 steps of warm-up, the last 10,800 settled
_MOVEMENT = _COMMON | {"epochs": 10, "batch_size": 16, "warmup": 0.0975, "hold": 0.0975, "ramp": 0.7075}
# PINS on RTE: 20 epochs of 156 steps of 16; 200 steps of warm-up, the last 1,200 settled
_PINS = _COMMON | {"epochs": 20, "batch_size": 16, "warmup": 0.064, "hold": 0.064, "ramp": 0.551, "density": 0.2}


def _with_demo(recipe):
    return {"*": recipe, "demo": recipe | _DEMO | {"batch_size": 64, "lr": 5e-4, "epochs": 10}}


RECIPES = {  # a method that is not here has its parent's
    "dense": _DENSE_TASKS,
    "smp-l": _SMP_TASKS,
    "magnitude": _with_demo(_MOVEMENT),
    "movement": _with_demo(_MOVEMENT | {"score_lr": 1e-2}),
    "soft-movement": _with_demo(_MOVEMENT | {"score_lr": 1e-2, "reg_lambda": 400.0, "density": None}),
    "l0": _with_demo(_MOVEMENT | {"score_lr": 1e-1, "reg_lambda": 125.0, "density": None}),
    "pins": _with_demo(_PINS | {"teacher": "self"}),
    "platon": _with_demo(_PINS),
    "sensitivity": _with_demo(_PINS | {"beta1": 0.0}),
}


def recipe(s):
    """The published value of each setting left open, for this method, task and density."""
    names = {Method: name for name, Method in METHODS.items() if name in RECIPES}
    tasks = RECIPES[next(names[Method] for Method in METHODS[s.method].__mro__ if Method in names)]
    values = dict(tasks.get(s.task, tasks["*"]))
    density = values["density"] or 1.0 if s.density is None else s.density
    # N / T on MNLI: 43,632, 5,250 and 3,500 of 73,632 steps at density 0.5 and below, 0.7 and 0.8 (SMP code).
    values.setdefault("ramp", 0.593 if density <= 0.5 else 0.071 if density <= 0.7 else 0.048)
    mnli_half = s.task == "mnli" and density == 0.5 and s.teacher in (None, "none")
    values.setdefault("temperature_s", 4.0 if density >= 0.7 else 3.0 if mnli_half else 1.0)
    return values


def inside(value, interval):
    """Is the number in an interval written as mathematics does, "(0, 1]"? NaN and infinity are in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    return low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"


def parse(argv):
    """{setting: value} of the flags given; UserError for an unknown one."""
    parser = Parser(__doc__)
    group = parser
    for f in fields(Settings):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        name = "--" + f.name.replace("_", "-")
        text = f.metadata["help"] + ("" if f.default is None else f"; default {f.default}")
        within = f.metadata["within"]
        kind = {"type": f.type} | ({"choices": within} if isinstance(within, tuple) else {"metavar": within})
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else kind
        group.add_argument(name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)
    return vars(parser.parse_args(argv))


def settings_from(given):
    """Settings with the recipe filled in and every value checked; UserError names the flag."""
    s = Settings(**given)
    s.task = get_task(s.task, s.task_file).name  # also: no such task
    if s.method == "dense" and s.density not in (None, 1.0):
        raise UserError(f"--density {s.density}: dense keeps every weight; choose another --method")
    if s.pattern != "weight":
        if not METHODS[s.method].top_k:
            raise UserError(f"--pattern {s.pattern}: {s.method} ranks single weights; use smp, movement or magnitude")
        n, m = n_of_m(s.pattern) if re.fullmatch(r"\d{1,2}:\d{1,2}", s.pattern) else (0, 1)
        if s.pattern not in TIED and not 0 < n < m:
            raise UserError(f"--pattern {s.pattern}: expected weight, {', '.join(TIED)} or n:m with 0 < n < m, as 2:4")
        if n and s.density not in (None, n / m):
            raise UserError(f"--density {s.density}: --pattern {s.pattern} keeps {n / m:g}; leave one of them out")
        s.density = n / m if n else s.density
    for name, value in recipe(s).items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    if s.out is None:
        kept = f"lambda{s.reg_lambda:g}" if s.density is None else f"{s.density:g}"
        kept += "" if s.pattern == "weight" else "-" + s.pattern.replace(":", "of")
        s.out = f"runs/{s.task}-{s.method}-{kept}-s{s.seed}"
    for f in fields(Settings):
        value, within = getattr(s, f.name), f.metadata["within"]
        if isinstance(within, str) and value is not None and not inside(value, within):
            raise UserError(f"--{f.name.replace('_', '-')} {value}: expected a number in {within}")
    if s.hold + s.ramp > 1:
        raise UserError(f"--hold {s.hold} --ramp {s.ramp}: together more than the run; expected a sum of at most 1")
    return s


# ---------------------------------------------------------------------------------------------------------------------
# the pieces of the loop


def lr_at(step, total_steps, warmup):
    """Factor of the learning rate: linear from 0 over `warmup` (a fraction of the run), then linear to 0 at the end."""
    rise = warmup * total_steps
    return step / rise if step < rise else (total_steps - step) / (total_steps - rise)


def pick_dtype(device):
    """bf16 where the device multiplies in it: such GPUs, and CPUs with AVX512-BF16 or AMX; fp16 on other GPUs."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    can = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not tell
    return "bf16" if device.type == "cpu" and (can.get("avx512_bf16") or can.get("amx_bf16")) else "fp32"


def trained(model, method):
    """{name: tensor}, live, of all that a step changes besides the optimizer's moments."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return parameters | {f"method.{name}": tensor for name, tensor in method.state().items()}


def save_checkpoint(path, model, method, optimizer, teacher, progress):
    """One safetensors file with what trains, its moments and the teacher's table; `progress` (JSON) in its header.
    Atomic."""
    tensors = {name: tensor.detach().cpu() for name, tensor in trained(model, method).items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value.cpu() for key, value in state.items()}
    tensors |= {} if teacher is None else {"teacher": teacher.cpu()}
    atomic_write(path, to_safetensors(tensors, metadata={"progress": json.dumps(progress)}))


def load_checkpoint(path, model, method, optimizer):
    """Put a checkpoint back; returns (teacher's table or None, `progress`). UserError where the file is damaged or of
    another model."""
    tensors, metadata = read_safetensors(path)
    teacher, live, state = tensors.pop("teacher", None), trained(model, method), {}
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        _, i, key = name.split(".")
        state.setdefault(int(i), {})[key] = tensors.pop(name)
    if live.keys() != tensors.keys() or "progress" not in metadata:
        raise UserError(f"{path}: holds other tensors than this run trains; start anew in another --out")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(tensors[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return teacher, json.loads(metadata["progress"])


class Log:
    """metrics.jsonl and the terminal: a live line on a terminal, plain lines elsewhere; silent on ranks but 0."""

    def __init__(self, path, rank):
        self.path, self.quiet, self.live = path, rank > 0, sys.stdout.isatty()

    def row(self, **values):
        if not self.quiet:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def say(self, text, over=False):
        if not self.quiet:
            ends = over and self.live
            print(("\r\033[K" if self.live else "") + text, end="" if ends else "\n", flush=True)

    def cut(self, step):
        """Drop the rows after `step`, and a torn last one: the resumed run writes them again."""
        rows = []
        if self.path.exists() and not self.quiet:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    rows += [line] if json.loads(line)["step"] <= step else []
            atomic_write(self.path, "".join(row + "\n" for row in rows))


def git_commit():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except OSError:
        return None


def peak_memory(device):
    """Bytes: the most the device's tensors took on CUDA, the most the process took elsewhere; 0 if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def targets(model, task, dataset, device, dtype):
    """What a teacher says of each example: logits (N, K) or, of a regression task, scores (N,). Dropout is off and the
    batches of `predict` are always the same, so that this is a function of the teacher alone."""
    logits = predict(model, dataset, device, dtype)
    return (to_score(logits, task.low, task.high) if task.regression else logits).to(device)


def load_teacher(run, s, task, tokenizer, train_set, judges, device, dtype, log):
    """(targets, metrics) of a dense run on the training set, computed once. Its label order is checked; `judges`
    {suffix: dataset} are what its score is of."""
    teacher, teacher_task, teacher_tokenizer, theirs = load_run(run)
    if theirs["method"] != "dense":
        raise UserError(f"--teacher {run}: a {theirs['method']} run; expected a dense one")
    if (teacher_task.name, teacher_task.labels) != (task.name, task.labels):
        raise UserError(
            f"--teacher {run}: trained on {teacher_task.name} with labels {list(teacher_task.labels)}; "
            f"this run is on {task.name} with labels {list(task.labels)}"
        )
    if teacher_tokenizer.to_str() != tokenizer.to_str():
        raise UserError(f"--teacher {run}: its tokenizer differs from that of {s.model}")
    teacher.to(device)
    metrics = evaluate(teacher, task, judges, device, dtype)
    log.say(f"teacher {run}: {show(metrics)}")
    return targets(teacher, task, train_set, device, dtype), metrics


def train(s, resume=False, command=""):
    """Run `s` and return what result.json holds."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(s.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank > 0:
        dist.barrier()  # rank 0 downloads, unzips and tokenises; the others find it done
    dtype = pick_dtype(device) if s.dtype == "auto" else s.dtype

    # data -> model -> method -> optimizer
    out = Path(s.out)
    log = Log(out / "metrics.jsonl", rank)
    source = find_model(s.model)
    config = read_config(source)
    task = get_task(s.task, s.task_file)
    tokenizer = load_tokenizer(source, config.vocab_size)
    if s.max_length > config.max_position_embeddings:
        raise UserError(f"--max-length {s.max_length}: {s.model} has {config.max_position_embeddings} positions")
    _, group = n_of_m(s.pattern)
    if config.hidden_size % group or config.intermediate_size % group:
        raise UserError(f"--pattern {s.pattern}: {s.model} is {config.hidden_size} and {config.intermediate_size} wide")
    Method = METHODS[s.method]
    outputs, words = task.num_classes or 1, []
    if Method.head == "words":
        label_words = task.words[1:] if task.regression and s.regression == "logit" else task.words
        words = word_ids(tokenizer, label_words)
        outputs = len(words)
    model = load_model(source, Method.head, outputs, words, s.seed, dropout=s.dropout)
    if Method.head == "words" and not hasattr(model, "cls"):
        log.say(f"{s.model} has no MLM head: classes are read as h_[CLS] . e(word), as the SMP paper writes it")
    train_set = load_dataset(task, "train", tokenizer, s.max_length, s.data_dir)
    dev_sets = load_dev(task, tokenizer, s.max_length, s.data_dir)
    if rank == 0 and world > 1:
        dist.barrier()
    held = {}  # part of train to choose the teacher on; else that is dev
    if s.teacher_split:
        train_set, held[""] = train_set.split(s.teacher_split, s.seed)
    steps_per_epoch = len(batches(train_set.lengths, s.batch_size, s.seed, 0, s.max_tokens))
    examples_per_step = len(train_set) / steps_per_epoch
    total_steps = s.max_steps or s.epochs * steps_per_epoch
    eval_every = s.eval_every or steps_per_epoch
    model.to(device)
    method = Method(model, s, total_steps)
    optimizer = torch.optim.AdamW(method.groups(), fused=device.type in ("cpu", "cuda"))
    peaks = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    net = model
    if world > 1:
        net = DistributedDataParallel(model)
        net.broadcast_buffers = False  # every rank makes the masks itself; as an argument deprecated since torch 2.13

    # progress: what a checkpoint remembers besides tensors
    progress = {"step": 0, "best": None, "seconds": 0.0, "eval_seconds": 0.0, "loss_sum": 0.0, "loss_steps": 0}
    progress["teacher"] = None  # the score that a new teacher must beat
    teacher, itself = None, s.teacher.split(":")[0] == "self"
    if resume and (out / "checkpoint.safetensors").exists():
        teacher, progress = load_checkpoint(out / "checkpoint.safetensors", model, method, optimizer)
        teacher = None if teacher is None else teacher.to(device)
        scaler.load_state_dict(progress["scaler"])
        log.say(f"resumed {out} at step {progress['step']}")
    elif teacher_run := {"none": "", "self": ""}.get(s.teacher, s.teacher.removeprefix("self:")):
        judges = held or dev_sets
        teacher, judged = load_teacher(teacher_run, s, task, tokenizer, train_set, judges, device, dtype, log)
        progress["teacher"] = judged[task.metrics[0]]
    if progress["step"] == 0 and rank == 0:
        about = {"settings": asdict(s), "labels": list(task.labels), "outputs": outputs, "words": words}
        about |= {"command": command, "git_commit": git_commit(), "model_sha256": model_sha256(source)}
        about |= {"dtype": dtype, "device": str(device), "world_size": world, "threads": torch.get_num_threads()}
        versions = {m.__name__: m.__version__ for m in (torch, np, tokenizers, safetensors)}
        about |= {"versions": versions | {"python": platform.python_version()}, "platform": platform.platform()}
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "config.json", json.dumps(about, indent=2) + "\n")
    log.cut(progress["step"])
    method.update(progress["step"])
    log.say(
        f"{s.method} on {task.name}: {len(train_set):,} examples, {total_steps:,} steps of {examples_per_step:.0f}, "
        f"{sum(p.numel() for g in optimizer.param_groups for p in g['params']):,} trained values, {device} {dtype}"
    )

    def check_finite():
        if math.isfinite(float(bad_step)):
            raise UserError(
                f"the loss or its gradient became NaN or infinite at step {int(bad_step)}; stopped. {out} keeps the "
                "last good checkpoint, if any; try a lower --lr or --score-lr, or --dtype fp32"
            )

    def checkpoint(step):
        check_finite()
        progress["step"], progress["seconds"] = step, seconds_before + time.perf_counter() - started
        progress["loss_sum"], progress["scaler"] = float(loss_sum), scaler.state_dict()
        if rank == 0:
            save_checkpoint(out / "checkpoint.safetensors", model, method, optimizer, teacher, progress)

    def save(folder):
        if rank == 0:
            save_model(folder, model, baked_state(model), source, task.labels)

    stop = []  # the signal that asked us to stop: the step is finished and a checkpoint written first

    def on_signal(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second one means it

    signals = (signal.SIGINT, signal.SIGTERM) if rank == 0 else ()
    handlers = {number: signal.signal(number, on_signal) for number in signals}

    loss_sum = torch.tensor(progress["loss_sum"], device=device)
    bad_step = torch.tensor(math.inf, device=device)
    started, seconds_before = time.perf_counter(), progress["seconds"]
    logged_at, logged_step, order, order_epoch = started, progress["step"], None, None
    model.train()
    for step in range(progress["step"], total_steps):
        epoch, place = divmod(step, steps_per_epoch)
        if order_epoch != epoch:
            order, order_epoch = batches(train_set.lengths, s.batch_size, s.seed, epoch, s.max_tokens), epoch
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_at(step, total_steps, s.warmup)
        torch.manual_seed((s.seed * 1_000_003 + step) * 1024 + rank)

        batch = order[place]
        mine = batch[rank::world]
        weight = world / len(batch) if len(mine) else 0.0
        mine = mine if len(mine) else batch[:1]  # nothing of a short batch for this rank: it takes part with weight 0
        parts = np.array_split(mine, min(s.grad_accum, len(mine)))
        for i, part in enumerate(parts):
            data = collate(train_set, part)
            with autocast(device, dtype):
                logits = net(**inputs(data, device))  # (B, K)
            labels = send(data["labels"], device)
            losses = task_loss(logits, labels, task.low, task.high)  # (B,)
            if teacher is not None:
                rows = teacher[send(torch.from_numpy(part), device)]
                if task.regression:  # the teacher's score beside the label; a squared error has no entropy to weigh by
                    losses = 0.5 * losses + 0.5 * task_loss(logits, rows, task.low, task.high)
                else:
                    losses = (self_distill if itself else distill)(losses, logits, rows)
            loss = losses.sum() * weight  # the mean over the global batch, once DistributedDataParallel has averaged
            with net.no_sync() if world > 1 and i < len(parts) - 1 else contextlib.nullcontext():
                scaler.scale(loss).backward()
            loss_sum += loss.detach() / world
        scaler.unscale_(optimizer)
        regulariser = method.penalise(step)
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], s.clip)
        method.observe(step, optimizer.param_groups[0]["lr"])
        finite = torch.isfinite(loss if dtype == "fp16" else loss + norm)  # fp16: the scaler skips infinite gradients
        bad_step = torch.where(finite, bad_step, bad_step.clamp(max=step))
        if device.type == "cpu":  # elsewhere reading it would wait for the device: when logging is soon enough
            check_finite()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        method.update(step)  # for the next step and for evaluation alike
        progress["loss_steps"] += 1

        if step % s.log_every == 0 or step == total_steps:
            check_finite()
            if world > 1:
                dist.all_reduce(loss_sum)
            value, now = float(loss_sum) / progress["loss_steps"], time.perf_counter()
            speed = examples_per_step * (step - logged_step) / (now - logged_at)
            lr = max(group["lr"] for group in optimizer.param_groups)
            row = {"step": step, "loss": value, "regulariser": float(regulariser), "density": method.achieved()}
            log.row(**row, lr=lr, examples_per_second=round(speed, 1))
            left = (total_steps - step) * examples_per_step / speed
            log.say(
                f"{100 * step / total_steps:5.1f}%  step {step}/{total_steps}  loss {value:.4f}  density "
                f"{row['density']:.4f}  lr {lr:.1e}  {speed:.0f} examples/s  {left / 60:.1f} min left",
                over=True,
            )
            loss_sum.zero_()
            progress["loss_steps"], logged_at, logged_step = 0, now, step
        if step % eval_every == 0 or step == total_steps:
            check_finite()
            eval_started = time.perf_counter()
            metrics = evaluate(model, task, dev_sets, device, dtype)
            log.row(step=step, density=method.achieved(), metrics=metrics)
            log.say(f"{100 * step / total_steps:5.1f}%  step {step}/{total_steps}  dev: {show(metrics)}")
            main = task.metrics[0]
            best = progress["best"]
            if method.settled(step) or (step == total_steps and best is None):  # at the final density only
                if best is None or metrics[main] > best["metrics"][main]:
                    progress["best"] = {"metrics": metrics, "step": step}
                    save(out / "best")
            spent = time.perf_counter() - eval_started
            progress["metrics"] = metrics
            progress["eval_seconds"] += spent
            logged_at += spent
            judged = evaluate(model, task, held, device, dtype) if itself and held else metrics
            beat = progress["teacher"]
            if itself and step < total_steps and (beat is None or judged[main] > beat):
                progress["teacher"] = judged[main]
                teacher = targets(model, task, train_set, device, dtype)
                log.row(step=step, teacher=judged[main])
                log.say(f"{100 * step / total_steps:5.1f}%  step {step}/{total_steps}  teaches itself from here")
            checkpoint(step)
        if stop:
            checkpoint(step)
            raise KeyboardInterrupt(stop[0])
    for number, handler in handlers.items():
        signal.signal(number, handler)

    seconds = seconds_before + time.perf_counter() - started
    save(out / "model")
    result = {"task": task.name, "model": s.model, "method": s.method, "density": s.density}
    result |= {"achieved_density": method.achieved(), "metrics": progress["metrics"], "best": progress["best"]}
    result |= {"seed": s.seed, "steps": total_steps, "epochs": round(total_steps / steps_per_epoch, 3)}
    speed = total_steps * examples_per_step / (seconds - progress["eval_seconds"])
    result |= {"train_seconds": round(seconds, 2), "examples_per_second": round(speed, 2)}
    result |= {"peak_memory_bytes": peak_memory(device), "command": command}
    if rank == 0:
        scores = {name: tensor.cpu().contiguous() for name, tensor in method.scores().items()}
        if scores:
            atomic_write(out / "scores.safetensors", to_safetensors(scores, metadata={"format": "pt"}))
        atomic_write(out / "result.json", json.dumps(result, indent=2) + "\n")
    log.say(f"{out}: {show(result['metrics'])} at density {result['achieved_density']:.4f}, {seconds:.0f} s")
    return result


def resumed(given):
    """The settings of the run in --out; a flag given now may not contradict them (device and data folder may)."""
    path = Path(given["out"]) / "config.json"
    saved = read_json(path).get("settings")
    if not isinstance(saved, dict) or saved.keys() != {f.name for f in fields(Settings)}:
        raise UserError(f"{path}: not the settings of a run of this version of train.py")
    for name, value in given.items():
        if name not in ("resume", "out", "device", "data_dir") and value != saved[name]:
            raise UserError(f"--{name.replace('_', '-')} {value}: {path} was started with {saved[name]}")
    return Settings(**saved | given)


def demo(command):
    """The embedded default: the same small pretrained BERT, once fine-tuned densely, once adapted by a mask alone."""
    results = []
    for method in ("dense", "smp-s"):
        out = f"runs/demo/{method}"
        if Path(out).exists():
            if read_json(Path(out) / "config.json").get("command") != command:
                raise UserError(f"{out}: not made by `{command}`; move it away, or give --out")
            shutil.rmtree(out)  # of an earlier one
        results.append(train(settings_from({"method": method, "out": out}), command=command))
        print()
    print(f"{'method':8} {'density':>8} {'achieved':>9} {'dev accuracy':>13} {'seconds':>8}")
    for r in results:
        accuracy, seconds = 100 * r["metrics"]["accuracy"], r["train_seconds"]
        print(f"{r['method']:8} {r['density']:8.2f} {r['achieved_density']:9.4f} {accuracy:13.2f} {seconds:8.1f}")
    print("\nnext, a real one: python train.py --model google-bert/bert-base-uncased --task mrpc --method smp-s")


@program
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "train.py", *argv])
    try:
        given = parse(argv)
        if not given:
            demo(command)
            return 0
        s, resume = settings_from(given), given.get("resume", False)
        if resume and (Path(s.out) / "config.json").exists():
            s = resumed(given | {"out": s.out})
        elif os.environ.get("RANK", "0") == "0" and os.path.exists(s.out):
            if not Path(s.out).is_dir() or any(Path(s.out).iterdir()):
                raise UserError(f"--out {s.out}: not empty; add --resume to continue that run, or name another")
        train(s, resume, command)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print("\ninterrupted; the same command with --resume continues the run", file=sys.stderr)
        return 128 + number
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
