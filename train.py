"""Fine-tune and prune BERT on a task: a plain loop.

    python train.py                                     the embedded demo: dense, then SMP-S at 10%
    python train.py --model google-bert/bert-base-uncased --task mnli --method smp-s --density 0.10
    torchrun --nproc-per-node 4 train.py ...            the same on four devices

On one CPU with one version of torch, the settings determine a run. The order of the data is drawn
from (seed, epoch), and dropout from (seed, step, rank). An interrupted run goes on bit-exactly from
its parameters, the moments of its optimizer, and its step. On a GPU the order of a sum may change.

Where the help of a flag says "recipe", the method and the task determine the value. --dry-run
prints the settings that differ from the defaults, and stops.
"""

from support.terminal import UserError, program, show, tell  # first: it says "loading torch"

import contextlib
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import batches, get_task, kind_of, load_dataset, load_dev, micro_batches, with_settings
from eval import evaluate, manner, warn_of_density
from kinds import KINDS
from models.checkpoint import check_form, load_model, read_config
from models.resume import Progress, load_progress, resumed, save_progress
from models.runs import begin_from, check_resumed, describe, describe_result, read_origin
from models.runs import source_of, warn_of_unknown, write_model, write_scores, write_task
from models.teacher import Teacher
from models.tokenizer import label_word_ids, load_tokenizer
from prune import METHODS
from support.fetch import find_config
from support.files import Log, claimed, make_folder, write_json
from support.machine import DEVICES, DTYPES, from_rank_0, join_processes, pick_dtype, store_frozen
from support.patterns import check_pattern, n_of_m
from support.recipes import recipe
from support.schedules import lr_at
from support.terminal import BELOW_ONE, COUNT, COUNT_OR_OFF, POSITIVE, POSITIVE_SHARE, RATE
from support.terminal import as_flag, live, number, parse_settings, show_settings, signals_noted

# ---------- settings ------------------------------------------------------------------------------

PINS_SCORES = ("absolute", "signed")
REGRESSIONS = ("interpolate", "logit")
FROZEN_DTYPES = ("fp32", "bf16")
DEMO_COMMAND = "python train.py"


@dataclass
class Settings:
    """Everything a run depends on.

    Each field is a flag. Its annotation is what `parse` gives to argparse, a parser of the text or
    the choices. Its comment is the help of the flag. "recipe": see support/recipes.py.
    """

    model: str = "demo"  # demo, a folder in Hugging Face's layout, or a Hugging Face id
    task: str = "demo"  # demo, a task of GLUE, squad, conll2003, e2e, webnlg or dart
    task_file: str = None  # your own task: a JSON file, see docs/methods.md
    method: tuple(METHODS) = "smp-s"  # how to prune; fixed needs --from
    density: POSITIVE_SHARE = None  # fraction kept; recipe 0.1, pins 0.2; l0, soft-movement: none
    from_run: str = None  # a finished run, or a fine-tuned model's folder, to start from
    out: str = None  # run folder; default runs/TASK-METHOD-DENSITY-sSEED
    resume: bool = False  # continue the run in --out from its last checkpoint (CPU: bit-exactly)

    data_dir: str = "data"  # folder of the data; what is missing is downloaded there
    max_length: COUNT = None  # tokens of an example; recipe by kind: 128 to 512, demo 32

    epochs: COUNT = None  # passes over the training set; recipe by method and task
    max_steps: COUNT_OR_OFF = 0  # optimizer steps of the whole run in place of epochs; 0: off
    batch_size: COUNT = None  # examples per step, over all devices; recipe by method and task
    max_tokens: COUNT_OR_OFF = 0  # tokens per step with padding, in place of batch-size; 0: off
    grad_accum: COUNT = 1  # micro-batches of a batch: less memory, same result up to dropout
    lr: RATE = None  # peak learning rate of the weights (smp trains none); recipe 1e-5 to 5e-4
    warmup: number(float, "[0, 1]") = None  # fraction of the run in which lr rises; by method
    weight_decay: RATE = None  # AdamW's, on matrices only; recipe dense 0.01 (Devlin), else 0
    clip: POSITIVE = 1.0  # largest gradient norm (SMP code; Devlin et al. code)
    dropout: BELOW_ONE = None  # probability, hidden and attention; recipe 0.1, as in pretraining
    seed: number(int, "[0, 2147483647]") = 0  # of a new head, data order, dropout, L0, splits

    pattern: str = "weight"  # what is kept as one: weight, unit, head, 8x8, or n:m as 2:4
    score_lr: RATE = None  # peak learning rate of the scores; recipe by method
    hold: BELOW_ONE = None  # fraction of the run at density 1, before the ramp; recipe by method
    ramp: POSITIVE_SHARE = None  # fraction of the run in which density falls; recipe by method
    ramp_power: COUNT = None  # how it falls: 3 is a cubic, 1 a line; recipe 3, smp on roberta 1
    reg_lambda: RATE = None  # final weight of the regulariser; recipe 400, l0 125, demo 200
    temperature_s: POSITIVE = None  # p in SMP-S's sigmoid(S/p); recipe 1, 3, 4 by density, task
    redistribute: bool = True  # SMP-S: pass on what a full matrix cannot take; no: as released
    pins_score: PINS_SCORES = "absolute"  # PINS: rank |I| (PINS code) or I (PINS paper)
    pins_window: COUNT = 10  # PINS: steps averaged, and between rankings in the ramp (PINS code)
    beta1: BELOW_ONE = None  # PINS: decay of the average of I; recipe 0.85, sensitivity 0
    beta2: BELOW_ONE = None  # PINS: the same of the uncertainty; recipe 0.99, span 0.95
    regression: REGRESSIONS = "interpolate"  # a value from p(yes) and p(no), or "yes" alone (SMP)
    teacher: str = None  # none, RUN (dense), self (own best) or self:RUN; recipe pins self
    teacher_split: number(float, "[0, 0.5]") = 0.0  # of train held out, to choose self; 0: on dev

    label_smoothing: BELOW_ONE = None  # texts: the weight of a uniform target in the loss; recipe
    beams: COUNT = None  # texts: beams in the last evaluation, 1 in earlier ones; recipe 5 or 10
    length_penalty: number(float, "[-10, 10]") = None  # texts: power of the length; recipe
    no_repeat_ngram: COUNT_OR_OFF = None  # texts: no N tokens in a row come twice; 0: off; recipe
    max_new_tokens: COUNT = None  # texts: tokens, at most; recipe 128
    eval_sources: COUNT = 500  # texts: sources, at most, in an evaluation before the last one

    eval_every: COUNT_OR_OFF = 0  # steps between evaluations, each with a checkpoint; 0: per epoch
    patience: COUNT_OR_OFF = 0  # stop after so many evaluations without a new best; 0: off
    log_every: COUNT = 50  # steps between log lines
    device: DEVICES = "auto"  # where to run
    dtype: DTYPES = None  # autocast; recipe auto: bf16 where the device computes in it; demo fp32
    frozen_dtype: FROZEN_DTYPES = "fp32"  # of frozen matrices; bf16 needs half the memory


def recipe_of(s):
    """Return the published values for these settings; see `recipe`."""
    kind = get_task(s.task, s.task_file).kind
    taught = s.teacher not in (None, "none")
    model_type = find_config(s.model).get("model_type", "bert")
    return recipe(METHODS[s.method].recipe, kind, s.task, model_type, s.density, taught)


def settings_from(given):
    """Return Settings with the recipe filled in; UserError names the flags that contradict."""
    s = Settings(**given)
    task = get_task(given.get("task"), s.task_file)
    s.task = task.name
    check_model_and_task(s, given)
    for one, other in (("epochs", "max_steps"), ("batch_size", "max_tokens")):
        if given.get(one) and given.get(other):
            raise UserError(f"{as_flag(one)} and {as_flag(other)}: give one of them")
        if getattr(s, other):
            setattr(s, one, 0)  # unused
    s.density = check_pattern(s.pattern, s.density)
    published = recipe_of(s)
    check_use(s.method, METHODS, given, published)
    check_use(task.kind, KINDS, given, published)
    for name, value in published.items():
        if getattr(s, name, "no setting") is None:
            setattr(s, name, value)
    if s.teacher_split and s.teacher.split(":")[0] != "self":
        only = "only --teacher self is chosen on that part"
        raise UserError(f"--teacher-split {s.teacher_split}: {only}")
    if s.hold + s.ramp > 1:
        raise UserError(f"--hold {s.hold} --ramp {s.ramp}: expected a sum of at most 1")
    if s.out is None:
        s.out = default_out(s)
    return s


def check_model_and_task(s, given):
    """Raise UserError where a model would read the demo's invented language, or the demo another.

    All would be unknown tokens. A task file may be in the demo's language.
    """
    if s.model != "demo" and not (given.get("task") or s.task_file):
        raise UserError(f"--model {s.model}: give --task or --task-file, too")
    if s.model == "demo" and s.task != "demo" and not s.task_file:
        only = "the demo's model knows the demo's language alone"
        raise UserError(f"--task {s.task}: {only}; give --model, too")


def check_use(user, users, given, published):
    """Raise UserError for a setting that one of `users` ignores, unless it changes nothing.

    `users` are the methods, or the kinds of task, by name.
    """
    of_some = {name for other in users.values() for name in other.uses}
    for name in given.keys() & of_some - set(users[user].uses):
        value = given[name]
        if value not in (published.get(name), getattr(Settings, name)):
            raise UserError(f"{as_flag(name)} {value}: {user} does not use it")


def default_out(s):
    kept = f"lambda{s.reg_lambda:g}" if s.density is None else f"{s.density:g}"
    kept += "" if s.pattern == "weight" else "-" + s.pattern.replace(":", "of")
    return f"runs/{s.task}-{s.method}-{kept}-s{s.seed}"


# ---------- set-up --------------------------------------------------------------------------------


class Run:
    """The model, data, method, optimizer and progress of one run. `loop` trains it."""

    def __init__(self, s, command):
        self.rank, self.world, self.device = join_processes(s.device)
        chosen = from_rank_0(json.dumps(asdict(s)).encode(), self.rank, self.world)
        self.settings = s = Settings(**json.loads(chosen))
        self.command = command
        self.out = Path(s.out)
        dtype = pick_dtype(self.device) if s.dtype == "auto" else s.dtype
        self.dtype = from_rank_0(dtype.encode(), self.rank, self.world).decode()
        self.log = Log(self.out / "metrics.jsonl", self.rank)
        tell(f"loading model {s.model}, task {s.task}")
        # The first process of a machine downloads and tokenises; the others find it done.
        waits = int(os.environ.get("LOCAL_RANK", 0)) > 0
        if waits:
            dist.barrier()
        self.task = with_settings(get_task(s.task, s.task_file), vars(s), "this run")
        self.kind = kind_of(self.task)
        self.load_model(s)
        self.load_data(s)
        if self.world > 1 and not waits:
            dist.barrier()
        self.make_method(s)
        self.begin(s)

    def load_model(self, s):
        """Load the tokenizer and the model; check the settings that depend on its sizes."""
        self.source = source_of(s, s.out if s.resume else None)
        Model, config = read_config(self.source)
        check_form(self.source, Model, self.kind.form)
        check_sizes(s, config)
        self.tokenizer = load_tokenizer(self.source, config.vocab_size, config.framed)
        self.origin = read_origin(self) if s.from_run else None
        head = self.kind.own_head or METHODS[s.method].output_head
        if head is None:
            if self.origin is None:
                raise UserError(f"--method {s.method}: needs a run to start from; give --from RUN")
            head = self.origin.model.output_head
        self.words = label_word_ids(self.tokenizer, self.task, s, head)
        options = {"form": self.kind.form, "labels": self.kind.outputs}
        sizes = (len(self.kind.outputs), self.words)
        self.model = load_model(self.source, head, *sizes, s.seed, s.dropout, **options)
        if head == "words" and not hasattr(self.model, "cls"):
            tell(f"{s.model} has no MLM head: the logit of a class is h . e(word)")

    def load_data(self, s):
        """Load the splits and count the steps."""
        make_folder(s.data_dir)
        self.train_set = load_dataset(self.task, "train", self.tokenizer, s.max_length, s.data_dir)
        warn_of_unknown(self)
        self.kind.learn_from(self.train_set)
        self.whole_dev = load_dev(self.task, self.tokenizer, s.max_length, s.data_dir)
        self.dev_sets = {name: part.kind.quick(part) for name, part in self.whole_dev.items()}
        self.held_out = {}  # part of train to choose the teacher on
        if s.teacher_split:
            self.train_set, part = self.train_set.split(s.teacher_split, s.seed)
            self.held_out["dev"] = part.kind.quick(part)
        self.steps_per_epoch = len(self.batches_of(0))
        self.examples_per_step = len(self.train_set) / self.steps_per_epoch
        self.total_steps = s.max_steps or s.epochs * self.steps_per_epoch

    def make_method(self, s):
        """Make the method, the optimizer and, for several processes, their common model."""
        try:
            self.method = METHODS[s.method](self.model.to(self.device), s, self.total_steps)
        except ValueError as error:
            raise UserError(f"--method {s.method}: {error}") from None
        store_frozen(self.model, s.frozen_dtype, self.dtype)
        fused = self.device.type != "mps"
        self.optimizer = torch.optim.AdamW(self.method.groups(), fused=fused)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "fp16")
        self.method.skips = self.scaler.is_enabled()
        self.net = DistributedDataParallel(self.model) if self.world > 1 else self.model
        # Every rank makes the masks itself, so they need not be sent. The argument of this name is
        # deprecated since torch 2.13. Without DistributedDataParallel nothing reads the attribute.
        self.net.broadcast_buffers = False

    def begin(self, s):
        """Go on from the run's checkpoint or, without one, from its first step."""
        self.progress = Progress()
        if self.origin:
            begin_from(self, self.origin)  # a checkpoint has only what is trained
        self.teacher = Teacher(s.teacher)
        path = self.out / "checkpoint.safetensors"
        saved = path.read_bytes() if s.resume and self.rank == 0 and path.exists() else b""
        saved = from_rank_0(saved, self.rank, self.world)
        if saved:
            if self.rank == 0:
                check_resumed(self)
            load_progress(self, saved, path)
            tell(f"resumed {self.out} at step {self.progress.step}")
            self.log.cut(self.progress.step)
        else:
            self.begin_anew()
        if self.origin:
            self.method.first = self.origin.density
            self.method.keep_zeros(self.origin.model.to(self.device))
            self.origin = None  # a second model
        self.method.update(self.progress.step)
        if not saved:
            self.log.row(step=0, density=self.method.achieved())
        # The sum of this rank. A checkpoint has the sum over all, which rank 0 takes.
        loss_sum = self.progress.loss_sum if self.rank == 0 else 0.0
        self.loss_sum = torch.tensor(loss_sum, device=self.device)
        self.norm = 0.0  # of the last gradient
        self.started = time.perf_counter() - self.progress.seconds

    def begin_anew(self):
        """Take over what the first teacher knows; write config.json."""
        if self.teacher.dense_run:
            self.teacher.load_run(self)
        if self.rank == 0:
            write_task(self)
            write_json(self.out / "config.json", describe(self))
        self.log.cut(-1)

    def batches_of(self, epoch):
        s = self.settings
        return batches(self.train_set.lengths, s.batch_size, s.seed, epoch, s.max_tokens)

    def measure(self, model, dev_sets):
        return evaluate(model, dev_sets, self.device, self.dtype)

    def speed(self, step):
        """Return the examples per second of the steps so far, without evaluations and teaching."""
        seconds = time.perf_counter() - self.started - self.progress.eval_seconds
        return step * self.examples_per_step / seconds

    def at(self, step):
        return f"{100 * step / self.total_steps:5.1f}%  step {step}/{self.total_steps}"


def check_sizes(s, config):
    """Raise UserError where a setting does not fit the sizes of the model."""
    if s.max_length > config.positions:
        raise UserError(f"--max-length {s.max_length}: {s.model} has {config.positions} positions")
    _, m = n_of_m(s.pattern)
    if config.hidden_size % m or config.intermediate_size % m:
        widths = f"{config.hidden_size} and {config.intermediate_size}"
        raise UserError(f"--pattern {s.pattern}: {s.model} is {widths} wide")


# ---------- the loop ------------------------------------------------------------------------------


def loop(run, signals):
    """Train `run` from the step it stands at to its last one.

    A signal in the list `signals` ends the training after the step that is being computed.
    """
    s = run.settings
    method = run.method
    optimizer, scaler = run.optimizer, run.scaler
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order_epoch = None
    run.model.train()
    for step in range(run.progress.step, run.total_steps):
        if s.patience and run.progress.since_best >= s.patience:
            tell(f"stopped: {s.patience} evaluations without a new best (--patience)")
            break
        epoch, place = divmod(step, run.steps_per_epoch)
        if epoch != order_epoch:
            order = run.batches_of(epoch)
            order_epoch = epoch
        for group, peak in zip(optimizer.param_groups, run.peaks):
            group["lr"] = peak * lr_at(step, run.total_steps, s.warmup)
        torch.manual_seed((s.seed * 1_000_003 + step) * 1024 + run.rank)

        backward(run, order[place])
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
            save_progress(run, step, sum_of_losses(run, step))
        number = agree_to_stop(run, step, signals)
        if number:
            save_progress(run, step, sum_of_losses(run, step))
            if run.world > 1:
                dist.barrier()  # torchrun ends rank 0 when another rank ends before it
            advice = f"python train.py --out {shlex.quote(s.out)} --resume goes on from there"
            raise KeyboardInterrupt(f"interrupted at step {step}; {advice}", 128 + number)


def backward(run, rows):
    """Add up the gradients of a batch, the `rows` of the training set; add its loss to the sum."""
    count = run.train_set.decision_counts[rows].sum()
    parts = micro_batches(rows, count, run.rank, run.world, run.settings.grad_accum)
    for i, (part, factor) in enumerate(parts):
        batch = run.train_set.collate(part)
        waits = run.world > 1 and i < len(parts) - 1  # to send all gradients at once
        with run.net.no_sync() if waits else contextlib.nullcontext():
            decided = run.kind.decide(run.net, batch, run.device, run.dtype)
            losses = run.teacher.losses(run.kind, decided)  # one per decision
            loss = losses.sum() * factor  # their sum over micro-batches is the batch's mean
            run.scaler.scale(loss).backward()
        run.loss_sum += loss.detach() / run.world


def agree_to_stop(run, step, signals):
    """Return the signal after which the run stops at this step, or 0.

    Ranks get a signal at different steps. Every four steps they agree whether to stop, by a tensor
    on the CPU, so that no device is waited for.
    """
    number = signals[0] if signals else 0
    if run.world > 1:
        if step % 4:
            return 0
        agreed = torch.tensor(number)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        number = int(agreed)
    return number


def sum_of_losses(run, step):
    """Return the sum of the losses since the last log line, of all ranks, after `check_finite`."""
    total = run.loss_sum.clone()
    if run.world > 1:
        dist.all_reduce(total)
    check_finite(run, step, total)
    return float(total)


def check_finite(run, step, loss_sum):
    """Raise UserError if a loss since the last log line, or the last gradient, is not finite.

    Raise it, too, if a mask may be wrong (on a GPU, once in 1e9 steps; see support/selection.py).

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
    if run.method.wrong:
        advice = "stopped; --resume goes on from the last checkpoint, with another sample"
        raise UserError(f"a sample misled the selection before step {step}; {advice}")


def log_step(run, step, regulariser):
    """Log the mean loss since the last log line, the density, and the speed."""
    loss = sum_of_losses(run, step) / run.progress.loss_steps
    density = run.method.achieved()
    row = {"step": step, "loss": loss, "regulariser": float(regulariser), "density": density}
    row["lr"] = max(group["lr"] for group in run.optimizer.param_groups)
    run.log.row(**row, examples_per_second=round(run.speed(step), 1))
    run.bar.set_postfix_str(f"loss {loss:.4f}, density {density:.4f}", refresh=False)
    run.loss_sum.zero_()
    run.progress.loss_steps = 0


def evaluate_step(run, step):
    """Measure on dev; keep the best at the final density; let the teacher change."""
    sum_of_losses(run, step)  # for its check
    started = time.perf_counter()
    progress = run.progress
    progress.metrics = metrics = run.measure(run.model, run.dev_sets)
    density = run.method.achieved()
    run.log.row(step=step, density=density, metrics=metrics)
    how = manner(run.dev_sets)
    tell(f"{run.at(step)}  density {density:.4f}  dev: {show(metrics)}{how}")
    main = run.task.metrics[0]
    best = progress.best
    last_chance = best is None and step == run.total_steps
    if run.method.settled(step) or last_chance:
        progress.since_best += 1
        if best is None or metrics[main] > best["metrics"][main]:
            progress.since_best = 0
            progress.best = {"metrics": metrics, "step": step}
            write_model(run, "best")
            write_scores(run, run.out / "best")
    run.teacher.consider(run, step, metrics)
    progress.eval_seconds += time.perf_counter() - started


# ---------- the command line ----------------------------------------------------------------------


def train(s, command):
    """Run the settings `s` and return what result.json holds."""
    with claimed(Path(s.out), s.resume, command == DEMO_COMMAND):
        run = Run(s, command)
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        tell(
            f"{s.method} on {s.task}: {len(run.train_set):,} examples, {run.total_steps:,} steps "
            f"of {run.examples_per_step:.0f}, {trained:,} trained values, {run.device} {run.dtype}"
        )
        with (
            signals_noted(alone=run.world == 1) as signals,
            live("train", run.total_steps, initial=run.progress.step) as run.bar,
        ):
            loop(run, signals)
        return finish(run)


def finish(run):
    """Write the model of the last step, the scores, and result.json; return what that holds."""
    write_model(run, "model")
    write_scores(run, run.out)
    whole = {name: part for name, part in run.whole_dev.items() if part is not run.dev_sets[name]}
    if whole:  # training has measured parts
        run.progress.metrics = run.progress.metrics | run.measure(run.model, whole)
    result = describe_result(run)
    if run.rank == 0:
        write_json(run.out / "result.json", result)
    achieved = result["achieved_density"]
    at = f"at density {achieved:.4f}, {run.progress.seconds:.0f} s"
    tell(f"{run.out}: {show(run.progress.metrics)}{manner(run.whole_dev)} {at}")
    warn_of_density(run.settings.density, achieved)
    return result


def choose(given):
    """Return the settings, and the source of those that were not given: a run, or a recipe."""
    if given.get("resume"):
        out = Path(given.get("out") or settings_from(given).out)
        if (out / "config.json").exists():
            return Settings(**resumed(given, out, Settings)), out / "config.json"
        if given.keys() == {"out", "resume"}:
            raise UserError(f"--resume: {out} is no run; give the settings of a new one, too")
    s = settings_from(given)
    return s, f"the recipe: {recipe_of(s)['source']}"


def start(given, command, dry_run):
    """Show the settings and, unless it is a dry run, train with them."""
    s, source = choose(given)
    show_settings(s, given, source)
    if not dry_run:
        return train(s, command)


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
        real = "python train.py --model google-bert/bert-base-uncased --task mrpc --method smp-s"
        tell("\n".join(["", *rows, "", f"next, a real one: {real}"]))


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
