"""Teachers: the model whose predictions a run learns from, besides the labels."""

import hashlib
import math

import torch
import torch.nn.functional as F

from models.checkpoint import baked_state
from models.runs import check_vocabulary, described, is_run, load_folder, load_run, name_of
from support.machine import from_rank_0
from support.tensors import as_safetensors, parse_safetensors, save_tensors
from support.terminal import UserError, show, tell


def distill(losses, student, teacher, most_entropy=None):
    """Return 0.5 * task + 0.5 * T^2 * KL(p_teacher || p_student) of each decision, with T = 2.

    `student` and `teacher` are logits (..., C) of decisions among C choices, and `losses` are
    those of the task, (...). SMP's released code does this. Its paper has KL(p_student ||
    p_teacher).
    """
    log_student = F.log_softmax(student / 2, dim=-1)
    p_teacher = F.softmax(teacher / 2, dim=-1)
    kl = F.kl_div(log_student, p_teacher, reduction="none").sum(-1)  # (..., C) -> (...)
    return 0.5 * losses + 0.5 * 2**2 * kl


def self_distill(losses, student, teacher, most_entropy=None):
    """Return PINS's self-regularised loss of each decision; the arguments are as in `distill`.

    (1 - a) * task + a * T^2 * CE(p_teacher, p_student at T), with T = 2 (PINS, released code).
    a = 1 - H(p_student) / log K is the student's own confidence, at temperature 1 and without
    gradient. K is the number of choices that a decision allows, and `most_entropy` is log K, a
    number or one per decision; None: all C are allowed.
    """
    if most_entropy is None:
        most_entropy = math.log(student.size(-1))
    p = F.softmax(student.detach(), dim=-1)
    entropy = torch.special.entr(p).sum(-1)  # (..., C) -> (...)
    a = 1 - entropy / most_entropy
    p_teacher = F.softmax(teacher / 2, dim=-1)
    ce = -(p_teacher * F.log_softmax(student / 2, dim=-1)).sum(-1)
    return (1 - a) * losses + a * 2**2 * ce


class Teacher:
    """None, a dense run, this run's own best checkpoint so far ("self"), or both in turn.

    "self:RUN" is a dense run until a checkpoint is better. In place of the run there may be a
    fine-tuned model in Hugging Face's layout.

    `table` is what the teacher says of the training set: what `teach` of the task's kind returns.
    It depends on nothing but teacher and example, and is computed once per teacher. Where such a
    table would not fit, because every token of a vocabulary is a choice, `table` is a frozen copy
    of the teacher, which computes beside the student. None: there is no teacher yet.
    """

    def __init__(self, setting):
        self.is_self = setting.split(":")[0] == "self"
        self.dense_run = "" if setting in ("none", "self") else setting.removeprefix("self:")
        self.table = None

    def load_run(self, run):
        """Let the dense run teach. Raises UserError where its labels or its tokens differ."""
        name = f"--teacher {self.dense_run}"
        if is_run(self.dense_run):
            model, task, tokenizer, settings = load_run(self.dense_run)
            if settings["method"] != "dense":
                raise UserError(f"{name}: a {settings['method']} run; expected a dense one")
            if name_of(task) != name_of(run.task):
                theirs, ours = [described(*name_of(one)) for one in (task, run.task)]
                raise UserError(f"{name}: trained on {theirs}; this run is on {ours}")
            if run.kind.tokenizer(tokenizer).to_str() != run.kind.tokenizer(run.tokenizer).to_str():
                raise UserError(f"{name}: its tokenizer differs from that of {run.settings.model}")
        else:
            model, tokenizer = load_folder(self.dense_run, run.task)
        check_vocabulary(name, tokenizer, run)
        positions = model.config.positions
        if run.settings.max_length > positions:
            raise UserError(f"{name}: has {positions} positions, but --max-length is larger")
        metrics = run.measure(model.to(run.device), run.held_out or run.dev_sets)
        tell(f"teacher {self.dense_run}: {show(metrics)}")
        self.take_over(run, model, metrics[run.task.metrics[0]])

    def consider(self, run, step, metrics):
        """Let the student of this step take over as teacher if it is better than the present one.

        `metrics` are those on dev. With --teacher-split the held-out part of train decides.
        """
        if not self.is_self or step == run.total_steps:
            return
        if run.held_out:
            metrics = run.measure(run.model, run.held_out)
        measured = metrics[run.task.metrics[0]]
        if run.progress.teacher is None or measured > run.progress.teacher:
            self.take_over(run, run.model, measured)
            run.log.row(step=step, teacher=measured)
            tell(f"{run.at(step)}  teaches itself from here")

    def take_over(self, run, model, measured):
        run.progress.teacher = measured
        run.progress.teacher_file = None
        if run.kind.teaches_beside:
            self.table = frozen_copy(model, baked_state(model))
        else:
            self.table = run.kind.teach(model, run.train_set, run.device, run.dtype)

    def losses(self, kind, decided):
        """Return the losses of the decisions of a batch, with the teacher's part."""
        if self.table is None:
            return decided.losses
        return kind.losses_taught(decided, self.table, self_distill if self.is_self else distill)

    # The table has a file of its own beside the checkpoint, because it is large and seldom changes.

    def save(self, run):
        """Write a new table to a file whose name has its hash; the checkpoint names it."""
        if self.table is None or run.progress.teacher_file:
            return
        tensors = {"teacher": self.table}
        if run.kind.teaches_beside:
            tensors = self.table.state_dict()
        digest = hashlib.sha256()
        for part in as_safetensors(tensors, {}):
            digest.update(part)
        run.progress.teacher_file = f"teacher-{digest.hexdigest()[:16]}.safetensors"
        save_tensors(run.out / run.progress.teacher_file, tensors)

    def load(self, run):
        """Read the table that the checkpoint names; UserError where it is missing or another."""
        name = run.progress.teacher_file
        if name is None:
            return
        path = run.out / name
        data = path.read_bytes() if run.rank == 0 and path.exists() else b""
        data = from_rank_0(data, run.rank, run.world)
        if hashlib.sha256(data).hexdigest()[:16] not in name:
            lost = "the run cannot be resumed without its teacher"
            raise UserError(f"{path}: missing or damaged; {lost}")
        tensors, _ = parse_safetensors(data, path)
        if run.kind.teaches_beside:
            self.table = frozen_copy(run.model, tensors).to(run.device)
        else:
            self.table = tensors["teacher"].to(run.device)


def frozen_copy(model, state):
    """Return a model of the same structure, with the weights `state` and no masks."""
    with torch.device("meta"):  # only the structure
        copy = type(model)(model.config, model.output_head, model.outputs, form=model.form)
    copy.load_state_dict({name: t.detach().clone() for name, t in state.items()}, assign=True)
    return copy.eval().requires_grad_(False)
