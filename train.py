"""Fine-tune and prune BERT on a task: a plain loop.

    python train.py                                     the embedded demo: dense, then SMP-S at 10%
    python train.py --model google-bert/bert-base-uncased --task mnli --method smp-s --density 0.10
    torchrun --nproc-per-node 4 train.py ...            the same on four devices

On one machine with one version of torch, the settings determine a run. The order of the data is
drawn from (seed, epoch), and dropout from (seed, step, rank). An interrupted run therefore
continues bit-exactly from its parameters, the moments of its optimizer, and its step.

Where the help of a flag says "recipe", the method and the task determine the value. --dry-run
prints the settings that differ from the defaults, and stops.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once
    print("loading torch", file=sys.stderr)  # this takes a second or two

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors
from torch.nn.parallel import DistributedDataParallel

from data import batches, collate, get_task, load_dataset, load_tokenizer, micro_batches, word_ids
from eval import Teacher, described, evaluate, load_dev, load_run, show, warn_of_density
from model import HEADS, decisions, inputs, load_model, model_sha256, read_config, save_model, send
from model import task_loss
from prune import METHODS, TIED, baked_state, n_of_m
from tools.common import DEVICES, Log, UserError, as_flag, atomic_write, autocast, claimed
from tools.common import from_rank_0, join_processes, live, number, parse_safetensors
from tools.common import parse_settings, peak_memory, pick_dtype, program, read_json
from tools.common import read_safetensors, require, save_tensors, show_settings, surroundings, tell
from tools.common import write_json
from tools.fetch import find_model

# -------------------------------------------------------------------------------------------------
# settings


COUNT = number(int, "[1, inf)")
COUNT_OR_OFF = number(int, "[0, inf)")
RATE = number(float, "[0, inf)")
POSITIVE = number(float, "(0, inf)")
POSITIVE_SHARE = number(float, "(0, 1]")
BELOW_ONE = number(float, "[0, 1)")
PINS_SCORES = ("absolute", "signed")
REGRESSIONS = ("interpolate", "logit")
DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass
class Settings:
    """Everything a run depends on.

    Each field is a flag. Its annotation is what `parse` gives to argparse, a parser of the text or
    the choices. Its comment is the help of the flag. "recipe": see the function `recipe`.
    """

    model: str = "demo"  # demo, a folder in Hugging Face's layout, or a Hugging Face id
    task: str = "demo"  # demo, cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, squad, conll2003
    task_file: str = None  # your own task: a JSON file, see README
    method: tuple(METHODS) = "smp-s"  # how to prune; fixed needs --from
    density: POSITIVE_SHARE = None  # fraction kept; recipe 0.1, pins 0.2 (span 0.1), l0, soft none
    from_run: str = None  # a finished run to start from, on the same model
    out: str = None  # run folder; default runs/TASK-METHOD-DENSITY-sSEED
    resume: bool = False  # continue the run in --out bit-exactly from its last checkpoint

    data_dir: str = "data"  # folder of the data; what is missing is downloaded there
    max_length: COUNT = None  # tokens of an example; recipe 128, span 384 (SMP code), tag 256

    epochs: COUNT = None  # passes over the training set; recipe by method and task
    max_steps: COUNT_OR_OFF = 0  # optimizer steps of the whole run in place of epochs; 0: off
    batch_size: COUNT = None  # examples per step, over all devices; recipe by method and task
    max_tokens: COUNT_OR_OFF = 0  # tokens per step with padding, in place of batch-size; 0: off
    grad_accum: COUNT = 1  # micro-batches of a batch: less memory, same result up to dropout
    lr: RATE = None  # peak learning rate of the weights; recipe 3e-5 (Devlin et al. A.3), or 5e-5
    warmup: number(float, "[0, 1]") = None  # fraction of the run in which lr rises; by method
    weight_decay: RATE = None  # AdamW's, on matrices only; recipe dense 0.01 (Devlin), else 0
    clip: POSITIVE = 1.0  # largest gradient norm (SMP code; Devlin et al. code)
    dropout: BELOW_ONE = None  # probability, hidden and attention; recipe 0.1, as in pretraining
    seed: number(int, "[0, 2147483647]") = 0  # of a new head, data order, dropout, L0, splits

    pattern: str = "weight"  # what is kept as one: weight, unit, head, or n:m as 2:4
    score_lr: RATE = None  # peak learning rate of the scores; recipe by method
    hold: BELOW_ONE = None  # fraction of the run at density 1, before the ramp; recipe by method
    ramp: POSITIVE_SHARE = None  # fraction of the run in which density falls; recipe by method
    ramp_power: COUNT = None  # how it falls: 3 is a cubic, 1 a line; recipe 3, smp on roberta 1
    reg_lambda: RATE = None  # final weight of the regulariser; recipe 400, l0 125
    temperature_s: POSITIVE = None  # p in SMP-S's sigmoid(S/p); recipe 1, 3, 4 by density (code)
    redistribute: bool = True  # SMP-S: pass on what a full matrix cannot take; no: as released
    pins_score: PINS_SCORES = "absolute"  # PINS: rank |I| (PINS code) or I (PINS paper)
    pins_window: COUNT = 10  # PINS: steps averaged, and between rankings in the ramp (PINS code)
    beta1: BELOW_ONE = None  # PINS: decay of the average of I; recipe 0.85, sensitivity 0
    beta2: BELOW_ONE = None  # PINS: the same of the uncertainty; recipe 0.99, span 0.95
    regression: REGRESSIONS = "interpolate"  # p(yes) against "no", or the logit of "yes" (SMP)
    teacher: str = None  # none, RUN (dense), self (own best) or self:RUN; recipe pins self
    teacher_split: number(float, "[0, 0.5]") = 0.0  # of train, to choose self; 0: on dev

    eval_every: COUNT_OR_OFF = 0  # steps between evaluations, each with a checkpoint; 0: per epoch
    log_every: COUNT = 50  # steps between log lines
    device: DEVICES = "auto"  # where to run
    dtype: DTYPES = None  # autocast; recipe auto: bf16 where the device computes in it; demo fp32


# The published recipes. RECIPES has a row for the recipe that a method's class names, "dense". It
# has rows for what differs on a kind of task, "kind span", for one recipe on it, "dense kind span",
# and for one task, "dense mrpc". A fraction of the run is the published number of steps over the
# steps of the run it is from.

COMMON = {
    "max_length": 128,
    "dropout": 0.1,
    "lr": 3e-5,
    "weight_decay": 0.0,
    "warmup": 0.0,
    "density": 0.1,
    "hold": 0.0,
    "ramp": 1.0,
    "ramp_power": 3,
    "score_lr": 0.0,
    "reg_lambda": 0.0,
    "temperature_s": 1.0,
    "beta1": 0.85,
    "beta2": 0.99,
    "teacher": "none",
    "dtype": "auto",
}
DENSE = COMMON | {
    "epochs": 3,
    "batch_size": 32,
    "density": 1.0,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "source": "Devlin et al. 2019, A.2 and A.3",
}
SMP = COMMON | {
    "epochs": 60,
    "batch_size": 32,
    "score_lr": 2e-2,
    "reg_lambda": 400.0,
    "source": "SMP, released run scripts",
}
# Movement pruning on SQuAD: 10 epochs of 5,540 steps; 5,400 of warm-up, the last 10,800 settled.
MOVEMENT = COMMON | {
    "epochs": 10,
    "batch_size": 16,
    "warmup": 0.0975,
    "hold": 0.0975,
    "ramp": 0.7075,
    "source": "movement pruning on SQuAD",
}
# PINS on RTE: 20 epochs of 156 steps; 200 steps of warm-up, the last 1,200 settled.
PINS = COMMON | {
    "epochs": 20,
    "batch_size": 16,
    "density": 0.2,
    "warmup": 0.064,
    "hold": 0.064,
    "ramp": 0.551,
    "source": "PINS on RTE",
}
# PLATON on SQuAD: 10 epochs of 5,533 steps; 5,400 of warm-up, the last 27,000 settled.
PINS_SPAN = {
    "epochs": 10,
    "density": 0.1,
    "warmup": 0.0976,
    "hold": 0.0976,
    "ramp": 0.414,
    "beta2": 0.95,
    "source": "PLATON on SQuAD; PINS has published none",
}

LARGE = {"epochs": 12, "batch_size": 64}
SMALL = {"epochs": 5, "source": "Devlin et al. 2019; epochs of transformers' GLUE examples"}
# The demo has short sentences, and a model pretrained without dropout, too small to gain by bf16.
DEMO = {"max_length": 32, "dropout": 0.0, "dtype": "fp32", "lr": 5e-4, "source": "the demo"}
DEMO_PRUNED = DEMO | {"epochs": 10, "batch_size": 64}

RECIPES = {
    "dense": DENSE,
    "smp": SMP,
    "magnitude": MOVEMENT,
    "movement": MOVEMENT | {"score_lr": 1e-2},
    "soft-movement": MOVEMENT | {"score_lr": 1e-2, "reg_lambda": 400.0, "density": None},
    "l0": MOVEMENT | {"score_lr": 1e-1, "reg_lambda": 125.0, "density": None},
    "pins": PINS | {"teacher": "self"},
    "platon": PINS,
    "sensitivity": PINS | {"beta1": 0.0},
    "fixed": DENSE | {"density": None},
}
RECIPES |= {f"{name} demo": DEMO_PRUNED for name in RECIPES}
RECIPES |= {
    "kind span": {"max_length": 384},
    "kind tag": {"max_length": 256},
    "dense kind span": {"lr": 5e-5, "source": "Devlin et al. 2019, 4.2"},
    "dense kind tag": {"lr": 5e-5, "batch_size": 8, "source": "transformers' example run_ner"},
    "dense mrpc": SMALL,
    "dense rte": SMALL,
    "dense wnli": SMALL,
    "dense demo": DEMO,
    "smp kind span": {"epochs": 10, "source": "SMP on SQuAD, released run script"},
    "smp on roberta": {"ramp_power": 1},  # by the name of the model, as in the released script
    "smp kind tag": {"epochs": 20, "source": "our choice; SMP has no tagging"},
    "smp mnli": LARGE,
    "smp qnli": LARGE,
    "smp qqp": LARGE,
    "smp sst2": LARGE,
    "smp rte": {"epochs": 100},
    "smp demo": DEMO_PRUNED | {"lr": 3e-5, "reg_lambda": 200.0},
    "pins kind span": PINS_SPAN,
    "platon kind span": PINS_SPAN,
    "sensitivity kind span": PINS_SPAN,
}
# What differs up to a density (SMP, released code). N / T on MNLI: 43,632, 5,250 and 3,500 of
# 73,632 steps; on SQuAD 22,650 of 55,340, then 22,670 and 5,000 of 27,670.
UP_TO_DENSITY = {
    "smp": ((0.5, {"ramp": 0.593}), (0.7, {"ramp": 0.071}), (1.0, {"ramp": 0.048})),
    "smp kind span": (
        (0.03, {"ramp": 0.409, "epochs": 20}),
        (0.5, {"ramp": 0.819}),
        (1.0, {"ramp": 0.181}),
    ),
}
# ... and at density 0.5 without a teacher
HALF_UNTAUGHT = {
    "smp mnli": {"temperature_s": 3.0},
    "smp kind span": {"temperature_s": 4.0, "ramp": 0.181},
}


def recipe(s):
    """Return the published value of each setting left open, for this method, task and density.

    Its "source" says where they are from.
    """
    name = METHODS[s.method].recipe
    kind = get_task(s.task, s.task_file).kind
    family = "roberta" if "roberta" in s.model.lower() else "bert"
    of_kind = f"{name} kind {kind}"
    rows = (name, f"kind {kind}", of_kind, f"{name} on {family}", f"{name} {s.task}")
    values = {}
    for row in rows:
        values |= RECIPES.get(row, {})
    density = s.density or values["density"] or 1.0
    if density >= 0.7:
        values["temperature_s"] = 4.0  # p (SMP, released code)
    for most, more in UP_TO_DENSITY.get(of_kind, UP_TO_DENSITY.get(name, ())):
        if density <= most:
            values |= more
            break
    if density == 0.5 and s.teacher in (None, "none"):
        for row in rows:
            values |= HALF_UNTAUGHT.get(row, {})
    return values


def settings_from(given):
    """Return Settings with the recipe filled in; UserError names the flags that contradict."""
    s = Settings(**given)
    s.task = get_task(given.get("task"), s.task_file).name
    for one, other in (("epochs", "max_steps"), ("batch_size", "max_tokens")):
        both = given.get(one) and given.get(other)
        require(not both, f"{as_flag(one)} and {as_flag(other)}: give one of them")
        if getattr(s, other):
            setattr(s, one, 0)  # unused
    scored = recipe(s)["score_lr"] or not s.score_lr
    require(scored, f"--score-lr {s.score_lr}: {s.method} has no scores")
    whole = s.method != "dense" or s.density in (None, 1.0)
    require(whole, f"--density {s.density}: dense keeps every weight; choose another --method")
    if s.pattern != "weight":
        check_pattern(s)
    for name, value in recipe(s).items():
        if getattr(s, name, "no setting") is None:
            setattr(s, name, value)
    taught_by_itself = s.teacher == "self" or s.teacher.startswith("self:")
    used = s.teacher_split == 0 or taught_by_itself
    require(used, f"--teacher-split {s.teacher_split}: only --teacher self is chosen on that part")
    if s.out is None:
        s.out = default_out(s)
    require(s.hold + s.ramp <= 1, f"--hold {s.hold} --ramp {s.ramp}: expected a sum of at most 1")
    return s


def check_pattern(s):
    """Raise UserError if the method or density does not fit the pattern; n:m sets the density."""
    able = METHODS[s.method].top_k
    require(able, f"--pattern {s.pattern}: {s.method} ranks single weights; use smp or movement")
    if s.pattern in TIED:
        return
    n, m = n_of_m(s.pattern) if re.fullmatch(r"\d{1,2}:\d{1,2}", s.pattern) else (0, 0)
    expected = f"expected weight, {', '.join(TIED)} or n:m with 0 < n < m, as 2:4"
    require(0 < n < m, f"--pattern {s.pattern}: {expected}")
    fits = s.density in (None, n / m)
    require(fits, f"--density {s.density}: --pattern {s.pattern} keeps {n / m:g}")
    s.density = n / m


def default_out(s):
    kept = f"lambda{s.reg_lambda:g}" if s.density is None else f"{s.density:g}"
    if s.pattern != "weight":
        kept += "-" + s.pattern.replace(":", "of")
    return f"runs/{s.task}-{s.method}-{kept}-s{s.seed}"


# -------------------------------------------------------------------------------------------------
# set-up


@dataclass
class Progress:
    """What a run remembers besides tensors; a checkpoint holds it as JSON."""

    step: int = 0  # optimizer steps done
    metrics: dict = None  # of the last evaluation
    best: dict = None  # metrics and step of the best evaluation at the final density
    teacher: float = None  # the metric of the present teacher, which a new one must exceed
    teacher_file: str = None  # the file of its table; None: not written yet
    seconds: float = 0.0  # in all
    eval_seconds: float = 0.0  # of these, in evaluations
    loss_sum: float = 0.0  # since the last log line
    loss_steps: int = 0  # in this sum
    scaler: dict = None  # the state of fp16's GradScaler


class Run:
    """The model, data, method, optimizer and progress of one run. `loop` trains it."""

    def __init__(self, s, command):
        self.rank, self.world, self.device = join_processes(s.device)
        chosen = from_rank_0(json.dumps(asdict(s)).encode(), self.rank, self.world)
        self.settings = s = Settings(**json.loads(chosen))
        self.command = command
        self.out = Path(s.out)
        self.dtype = pick_dtype(self.device) if s.dtype == "auto" else s.dtype
        self.log = Log(self.out / "metrics.jsonl", self.rank)
        tell(f"loading model {s.model}, task {s.task}")
        # The first process of a machine downloads and tokenises; the others find it done.
        waits = int(os.environ.get("LOCAL_RANK", 0)) > 0
        if waits:
            dist.barrier()
        os.makedirs(s.data_dir, exist_ok=True)
        self.task = get_task(s.task, s.task_file)
        self.source = find_model(s.model)
        self.prepare_model(s)
        self.prepare_data(s)
        if self.world > 1 and not waits:
            dist.barrier()

        try:
            self.method = METHODS[s.method](self.model.to(self.device), s, self.total_steps)
        except ValueError as error:
            raise UserError(f"--method {s.method}: {error}") from None
        fused = self.device.type != "mps"
        self.optimizer = torch.optim.AdamW(self.method.groups(), fused=fused)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "fp16")
        self.net = DistributedDataParallel(self.model) if self.world > 1 else self.model
        # Every rank makes the masks itself, so they need not be sent. The argument of this name is
        # deprecated since torch 2.13. Without DistributedDataParallel nothing reads the attribute.
        self.net.broadcast_buffers = False

        self.progress = Progress()
        self.teacher = Teacher(s.teacher)
        path = self.out / "checkpoint.safetensors"
        saved = path.read_bytes() if s.resume and self.rank == 0 and path.exists() else b""
        saved = from_rank_0(saved, self.rank, self.world)
        if saved:
            load_checkpoint(self, saved, path)
            tell(f"resumed {self.out} at step {self.progress.step}")
        elif s.from_run:
            begin_from(self)
        if self.teacher.dense_run and not saved:
            self.teacher.load(self)
        if s.from_run:
            self.method.first = read_json(Path(s.from_run, "result.json"))["achieved_density"]
            self.method.hold(self.origin[0].to(self.device))
            del self.origin  # a second model
        if self.progress.step == 0 and self.rank == 0:
            write_json(self.out / "config.json", describe(self))
        self.log.cut(self.progress.step if saved else -1)
        self.method.update(self.progress.step)
        if not saved:
            self.log.row(step=0, density=self.method.achieved())
        # The sum of this rank. A checkpoint has the sum over all, which rank 0 takes.
        loss_sum = self.progress.loss_sum if self.rank == 0 else 0.0
        self.loss_sum = torch.tensor(loss_sum, device=self.device)
        self.norm = 0.0  # of the last gradient
        self.started = time.perf_counter() - self.progress.seconds

    def prepare_model(self, s):
        """Load the tokenizer and the model; check the settings that depend on its sizes."""
        config = read_config(self.source)
        most = config.positions
        require(
            s.max_length <= most, f"--max-length {s.max_length}: {s.model} has {most} positions"
        )
        _, m = n_of_m(s.pattern)
        fits = config.hidden_size % m == config.intermediate_size % m == 0
        widths = f"{config.hidden_size} and {config.intermediate_size}"
        require(fits, f"--pattern {s.pattern}: {s.model} is {widths} wide")
        self.tokenizer = load_tokenizer(self.source, config.vocab_size)
        head = METHODS[s.method].output_head
        if s.from_run:
            self.origin = read_origin(s, self.source)
            head = head or self.origin[0].output_head
        require(head, f"--method {s.method}: needs a run to start from; give --from RUN")
        self.words = []
        if head == "words":
            by_logit = self.task.regression and s.regression == "logit"
            label_words = self.task.words[1:] if by_logit else self.task.words
            given = f'give "words" in the task file; {s.method} needs one for each label'
            require(label_words, f"task {self.task.name} has no label words: {given}")
            self.words = word_ids(self.tokenizer, label_words)
        outputs = len(self.task.labels) or 1
        self.model = load_model(
            self.source, head, outputs, self.words, s.seed, s.dropout, kind=self.task.kind
        )
        if head == "words" and not hasattr(self.model, "cls"):
            tell(f"{s.model} has no MLM head: the logit of a class is h . e(word)")

    def prepare_data(self, s):
        """Load the splits and count the steps."""
        self.train_set = load_dataset(self.task, "train", self.tokenizer, s.max_length, s.data_dir)
        self.dev_sets = load_dev(self.task, self.tokenizer, s.max_length, s.data_dir)
        self.held_out = {}  # part of train to choose the teacher on
        if s.teacher_split:
            self.train_set, self.held_out[""] = self.train_set.split(s.teacher_split, s.seed)
        self.steps_per_epoch = len(self.batches_of(0))
        self.examples_per_step = len(self.train_set) / self.steps_per_epoch
        self.total_steps = s.max_steps or s.epochs * self.steps_per_epoch

    def batches_of(self, epoch):
        s = self.settings
        return batches(self.train_set.lengths, s.batch_size, s.seed, epoch, s.max_tokens)

    def measure(self, model, dev_sets):
        return evaluate(model, self.task, dev_sets, self.device, self.dtype)

    def speed(self, step):
        """Return the examples per second of the steps so far, without evaluations."""
        seconds = time.perf_counter() - self.started - self.progress.eval_seconds
        return step * self.examples_per_step / seconds

    def at(self, step):
        return f"{100 * step / self.total_steps:5.1f}%  step {step}/{self.total_steps}"

    def save(self, name):
        """Write the model with its masks applied into the folder `name` of the run."""
        if self.rank == 0:
            state = baked_state(self.model)
            save_model(self.out / name, self.model, state, self.source, self.task.labels)

    def save_scores(self, folder):
        """Write the scores and masks, if there are any, into `folder`."""
        tensors = self.method.tensors()
        if tensors and self.rank == 0:
            save_tensors(folder / "scores.safetensors", tensors, format="pt")


def read_origin(s, source):
    """Return (model, task, tokenizer, settings) of the run to start from.

    Raises UserError where it is not finished, or of another model or method.
    """
    origin = load_run(s.from_run)
    theirs = origin[-1]
    same = theirs["model_sha256"] == model_sha256(source)
    require(same, f"--from {s.from_run}: began with another model than {s.model}")
    fits = theirs["method"] == s.method or METHODS[s.method].output_head is None
    require(fits, f"--from {s.from_run}: a {theirs['method']} run; expected {s.method}, or fixed")
    return origin


def begin_from(run):
    """Give a run what a finished one has learned, but not its output head for other labels."""
    model, task, _, _ = run.origin
    tensors = model.state_dict()
    if run.method.masks:
        tensors |= read_safetensors(Path(run.settings.from_run, "checkpoint.safetensors"))[0]
    head, _ = HEADS[run.task.kind]
    same = described(task) == described(run.task)
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if name in tensors and (same or not name.startswith(head)):
                p.copy_(tensors[name])


def lr_at(step, total_steps, warmup):
    """Return the factor of the learning rate.

    It rises from 0 over `warmup`, a fraction of the run, then falls to 0 at the end; both linearly.
    """
    rise = warmup * total_steps
    return step / rise if step < rise else (total_steps - step) / (total_steps - rise)


# -------------------------------------------------------------------------------------------------
# the loop


def loop(run, stop):
    """Train `run` from the step it stands at to its last one.

    `stop` is a list. A signal in it ends the training after the step that is being computed.
    """
    s = run.settings
    task = run.task
    method = run.method
    optimizer = run.optimizer
    scaler = run.scaler
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order_epoch = None
    run.model.train()
    for step in range(run.progress.step, run.total_steps):
        epoch, place = divmod(step, run.steps_per_epoch)
        if epoch != order_epoch:
            order = run.batches_of(epoch)
            order_epoch = epoch
        for group, peak in zip(optimizer.param_groups, run.peaks):
            group["lr"] = peak * lr_at(step, run.total_steps, s.warmup)
        torch.manual_seed((s.seed * 1_000_003 + step) * 1024 + run.rank)

        # forward and backward, one micro-batch after another
        batch = order[place]
        count = run.train_set.decision_counts[batch].sum()
        parts = micro_batches(batch, count, run.rank, run.world, s.grad_accum)
        for i, (part, factor) in enumerate(parts):
            data = collate(run.train_set, part)
            on_device = inputs(data, run.device)
            labels = send(data["labels"], run.device)
            waits = run.world > 1 and i < len(parts) - 1  # to send all gradients at once
            with run.net.no_sync() if waits else contextlib.nullcontext():
                with autocast(run.device, run.dtype):
                    logits = run.net(**on_device)  # (B, K) or (B, T, K)
                mask = on_device["attention_mask"]
                logits, most_entropy = decisions(task.kind, logits, mask)  # (..., C)
                losses = task_loss(logits, labels, task.low, task.high)  # one per decision
                losses = run.teacher.losses(task, losses, logits, most_entropy, data, mask)
                loss = losses.sum() * factor  # their sum over micro-batches is the batch's mean
                scaler.scale(loss).backward()
            run.loss_sum += loss.detach() / run.world

        scaler.unscale_(optimizer)
        regulariser = method.penalise(step)
        run.norm = torch.nn.utils.clip_grad_norm_(parameters, s.clip)
        method.observe(step, optimizer.param_groups[0]["lr"])
        if run.device.type == "cpu":
            check_finite(run, step, run.loss_sum)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        method.update(step)  # for the next step, and for evaluation

        run.bar.update()
        run.progress.loss_steps += 1
        last = step == run.total_steps
        if step % s.log_every == 0 or last:
            log_step(run, step, regulariser)
        if step % (s.eval_every or run.steps_per_epoch) == 0 or last:
            evaluate_step(run, step)
            save_checkpoint(run, step)
        number = agree_to_stop(run, step, stop)
        if number:
            save_checkpoint(run, step)
            if run.world > 1:
                dist.barrier()  # torchrun ends rank 0 when another rank ends before it
            advice = f"python train.py --out {shlex.quote(s.out)} --resume goes on from there"
            raise KeyboardInterrupt(f"interrupted at step {step}; {advice}", 128 + number)


def agree_to_stop(run, step, stop):
    """Return the signal after which the run stops at this step, or 0.

    Ranks get a signal at different steps. Every four steps they agree whether to stop, by a tensor
    on the CPU, so that no device is waited for.
    """
    number = stop[0] if stop else 0
    if run.world > 1:
        if step % 4:
            return 0
        agreed = torch.tensor(number)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        number = int(agreed)
    return number


def sum_over_ranks(run):
    """Return the sum of the losses since the last log line, of all ranks."""
    total = run.loss_sum.clone()
    if run.world > 1:
        dist.all_reduce(total)
    return total


def check_finite(run, step, loss_sum):
    """Raise UserError if a loss since the last log line, or the last gradient, is not finite.

    Raise it, too, if a mask may be wrong (on a GPU, once in 1e9 steps; see tools/selection.py).

    In fp16 the scaler skips steps of infinite gradients, and each skip halves its scale. The
    scale begins at 65,536, so 17 skips in a row bring it below 1. On a device other than a CPU this
    function makes the host wait.
    """
    total = loss_sum if run.dtype == "fp16" else loss_sum + run.norm
    if not math.isfinite(total) or run.scaler.get_scale() < 1:
        raise UserError(
            f"the loss or its gradient became NaN or infinite at step {step}; stopped. {run.out} "
            "keeps the last good checkpoint, if any; try a lower --lr, --score-lr or --reg-lambda, "
            "or --dtype fp32"
        )
    advice = "stopped; --resume goes on from the last checkpoint, with another sample"
    require(not run.method.wrong, f"a sample misled the selection before step {step}; {advice}")


def log_step(run, step, regulariser):
    """Log the mean loss since the last log line, the density, and the speed."""
    loss_sum = sum_over_ranks(run)
    check_finite(run, step, loss_sum)
    loss = float(loss_sum) / run.progress.loss_steps
    row = {"step": step, "loss": loss, "regulariser": float(regulariser)}
    row |= {
        "density": run.method.achieved(),
        "lr": max(g["lr"] for g in run.optimizer.param_groups),
    }
    run.log.row(**row, examples_per_second=round(run.speed(step), 1))
    text = f"loss {loss:.4f}, density {row['density']:.4f}"
    run.bar.set_postfix_str(text, refresh=False)
    run.loss_sum.zero_()
    run.progress.loss_steps = 0


def evaluate_step(run, step):
    """Measure on dev; keep the best at the final density; let the teacher change."""
    check_finite(run, step, sum_over_ranks(run))
    progress = run.progress
    started = time.perf_counter()
    progress.metrics = metrics = run.measure(run.model, run.dev_sets)
    density = run.method.achieved()
    run.log.row(step=step, density=density, metrics=metrics)
    tell(f"{run.at(step)}  density {density:.4f}  dev: {show(metrics)}")
    main = run.task.metrics[0]
    best = progress.best
    last_chance = best is None and step == run.total_steps
    if run.method.settled(step) or last_chance:
        if best is None or metrics[main] > best["metrics"][main]:
            progress.best = {"metrics": metrics, "step": step}
            run.save("best")
            run.save_scores(run.out / "best")
    progress.eval_seconds += time.perf_counter() - started
    run.teacher.consider(run, step, metrics)


# -------------------------------------------------------------------------------------------------
# the run folder


def remembered(run):
    """Return {name: tensor} of what checkpoint.safetensors holds besides `Progress`.

    The teacher's table has a file of its own, because it is large and seldom changes.

    NAME               what is trained, under the model's names
    method.NAME        what the method remembers, see `Dense.state`
    optimizer.I.KEY    what AdamW remembers of parameter I
    """
    tensors = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    tensors |= {f"method.{name}": tensor for name, tensor in run.method.state().items()}
    for i, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": tensor for key, tensor in state.items()}
    return tensors


def save_checkpoint(run, step):
    """Write checkpoint.safetensors, which is all that --resume needs."""
    loss_sum = sum_over_ranks(run)
    check_finite(run, step, loss_sum)
    run.progress.step = step
    run.progress.seconds = time.perf_counter() - run.started
    run.progress.loss_sum = float(loss_sum)
    run.progress.scaler = run.scaler.state_dict()
    if run.rank > 0:
        return
    save_teacher(run)
    progress = json.dumps(asdict(run.progress))
    save_tensors(run.out / "checkpoint.safetensors", remembered(run), progress=progress)
    for path in run.out.glob("teacher-*.safetensors"):
        if path.name != run.progress.teacher_file:
            path.unlink()  # of the checkpoint before


def save_teacher(run):
    """Write a new teacher's table to a file whose name has its hash; the checkpoint names it."""
    if run.teacher.table is None or run.progress.teacher_file:
        return
    data = to_safetensors({"teacher": run.teacher.table.cpu()})
    run.progress.teacher_file = f"teacher-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    atomic_write(run.out / run.progress.teacher_file, data)


def load_teacher(run):
    """Read the table that the checkpoint names. Raises UserError where it is missing or another."""
    name = run.progress.teacher_file
    if name is None:
        return
    path = run.out / name
    data = path.read_bytes() if run.rank == 0 and path.exists() else b""
    data = from_rank_0(data, run.rank, run.world)
    same = hashlib.sha256(data).hexdigest()[:16] in name
    require(same, f"{path}: missing or damaged; the run cannot be resumed without its teacher")
    tensors, _ = parse_safetensors(data, path)
    run.teacher.table = tensors["teacher"].to(run.device)


def load_checkpoint(run, data, path):
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
    same = ours.keys() == tensors.keys() and "progress" in header
    require(same, f"{path}: of another model or method; start anew in another --out")
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(tensors[name])
    run.progress = Progress(**json.loads(header["progress"]))
    run.scaler.load_state_dict(run.progress.scaler)
    load_teacher(run)


def describe(run):
    """Return what config.json of a run folder holds."""
    return {
        "settings": asdict(run.settings),
        "labels": list(run.task.labels),
        "kind": run.task.kind,
        "outputs": run.model.outputs,
        "output_head": run.model.output_head,
        "words": run.words,
        "command": run.command,
        "model_sha256": model_sha256(run.source),
        "dtype": run.dtype,
        "device": str(run.device),
        "world_size": run.world,
        **surroundings(),
    }


def finish(run):
    """Write the model of the last step, the scores, and result.json; return what that holds."""
    s = run.settings
    progress = run.progress
    run.save("model")
    run.save_scores(run.out)
    result = {
        "task": s.task,
        "model": s.model,
        "method": s.method,
        "density": s.density,
        "achieved_density": run.method.achieved(),
        "metrics": progress.metrics,
        "best": progress.best,
        "seed": s.seed,
        "steps": run.total_steps,
        "epochs": round(run.total_steps / run.steps_per_epoch, 3),
        "train_seconds": round(progress.seconds, 2),
        "examples_per_second": round(run.speed(run.total_steps), 2),
        "peak_memory_bytes": peak_memory(run.device),
        "command": run.command,
    }
    if run.rank == 0:
        write_json(run.out / "result.json", result)
    density = f"density {result['achieved_density']:.4f}"
    tell(f"{run.out}: {show(progress.metrics)} at {density}, {progress.seconds:.0f} s")
    warn_of_density(s.density, result["achieved_density"])
    return result


# -------------------------------------------------------------------------------------------------
# the command line


def train(s, command):
    """Run the settings `s` and return what result.json holds."""
    with claimed(Path(s.out), s.resume, command == DEMO_COMMAND):
        run = Run(s, command)
        train_run(run)
        return finish(run)


def train_run(run):
    """Train a run to its end. A signal stops it after a step, with a checkpoint."""
    s = run.settings
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    tell(
        f"{s.method} on {s.task}: {len(run.train_set):,} examples, {run.total_steps:,} steps of "
        f"{run.examples_per_step:.0f}, {trained:,} trained values, {run.device} {run.dtype}"
    )
    stop = []

    def ask_to_stop(number, frame):
        """Ask the loop to stop after its step. A second signal ends a single process at once."""
        stop.append(number)
        if run.world == 1:
            signal.signal(number, signal.SIG_DFL)

    signals = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none, and nohup ignores it
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        signals.append(hangup)
    handlers = {number: signal.signal(number, ask_to_stop) for number in signals}
    try:
        with live("train", run.total_steps, initial=run.progress.step) as run.bar:
            loop(run, stop)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def resumed(given, out):
    """Return the settings of the run in `out`.

    Raises UserError where a flag given now contradicts them. Device and data folder may differ.
    """
    path = out / "config.json"
    config = read_json(path)
    saved = config.get("settings")
    ours = isinstance(saved, dict) and saved.keys() == {f.name for f in fields(Settings)}
    require(ours, f"{path}: not the settings of a run of this version of train.py")
    for name, value in given.items():
        free = name in ("resume", "out", "device", "data_dir") or value == saved[name]
        require(free, f"{as_flag(name)} {value}: {path} was started with {saved[name]}")
    return Settings(**saved | given | {"out": str(out), "dtype": config["dtype"]})  # no "auto"


def choose(given):
    """Return the settings, and the source of those that were not given: a run, or a recipe."""
    both = given.keys() >= {"from_run", "resume"}
    require(not both, "--from and --resume: give one; a run remembers where it began")
    if given.get("resume"):
        out = Path(given.get("out") or settings_from(given).out)
        if (out / "config.json").exists():
            return resumed(given, out), out / "config.json"
    s = settings_from(given)
    return s, f"the recipe: {recipe(s)['source']}"


def start(given, command, dry_run):
    """Show the settings and, unless it is a dry run, train with them."""
    s, source = choose(given)
    show_settings(s, given, source)
    if not dry_run:
        return train(s, command)


DEMO_COMMAND = "python train.py"


def demo(dry_run):
    """Run the embedded default: the same small pretrained BERT, dense and by a mask alone."""
    rows = ["method    density  achieved  dev accuracy  seconds"]
    for method in ("dense", "smp-s"):
        r = start({"method": method, "out": f"runs/demo/{method}"}, DEMO_COMMAND, dry_run)
        if r:
            density = f"{r['density']:8.2f} {r['achieved_density']:9.4f}"
            accuracy = 100 * r["metrics"]["accuracy"]
            rows.append(f"{method:8} {density} {accuracy:13.2f} {r['train_seconds']:8.1f}")
    if not dry_run:
        tell("\n" + "\n".join(rows))
        real = "python train.py --model google-bert/bert-base-uncased --task mrpc --method smp-s"
        tell(f"\nnext, a real one: {real}")


@program
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    given = parse_settings(Settings, __doc__, argv)
    dry_run = given.pop("dry_run", False)
    try:
        if given:
            start(given, shlex.join(["python", "train.py", *argv]), dry_run)
        else:
            demo(dry_run)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
