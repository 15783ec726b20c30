"""Properties of runs of several processes: they equal a run of one, and they stop together.

This file is also the program of these processes, the workers: a pair makes several runs, one after
another. Most workers are forks (see forks.py). They share the seed of Python's hashes, so a pair
that torchrun starts shows that the order of a set makes no difference.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train
from data import Task, prepare
from forks import Fork
from models import resume
from support.machine import join_processes
from support.tensors import save_tensors

ROOT = Path(train.__file__).parent
Run = train.Run
TERMINATED = 128 + signal.SIGTERM
LOST = 300  # seconds after which a process that does not end fails its test


# -------------------------------------------------------------------------------------------------
# the worker


def watched_run(note, interrupt, s, command):
    """Return a `train.Run` that writes into `note` what it does.

    "masks" and "parameters" are a hash of each after every step. "seeds" are those of dropout.
    "reductions" is how often the gradients were averaged over the ranks. With `interrupt` = (rank,
    step), that rank gets SIGTERM in that step.
    """
    run = Run(s, command)
    note["out"] = str(run.out)
    if s.method == "smp-s" and run.progress.step == 0:
        draw_scores(run)
    update = run.method.update

    def noted(step):
        """Make the masks of `step`, and note them."""
        update(step)
        note["masks"].append(hash_of(run.model.buffers()))
        note["parameters"].append(hash_of(run.model.parameters()))
        note["seeds"].append(torch.initial_seed())
        if interrupt == [run.rank, step]:
            signal.raise_signal(signal.SIGTERM)

    def counted(_, bucket):
        """Average a bucket of gradients over the ranks, as DistributedDataParallel does."""
        note["reductions"] += bucket.is_last()
        return allreduce_hook(None, bucket)

    run.method.update = noted
    if run.world > 1:
        run.net.register_comm_hook(None, counted)
    return run


def draw_scores(run):
    """Let the scores start at random values, the same on every rank.

    If they were all 0, Adam's first step, nearly lr * sign(g), would leave scores that are almost
    tied, and the order in which a sum is taken would decide which are kept.
    """
    for i, linear in enumerate(run.method.linears):
        generator = torch.Generator().manual_seed(i)
        torch.nn.init.normal_(linear.scores, generator=generator)
    run.method.update(0)


def saved_slowly(*args, **header):
    """Save tensors as a slow disk does: a rank that does not wait for it has long ended."""
    time.sleep(0.5)
    save_tensors(*args, **header)


def hash_of(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def make(plan):
    """Make the runs of a plan in this process, one after another; return a note of each.

    A plan is a list of {"flags": the flags of train.py, "interrupt": see `watched_run`}. The runs
    share one process group. A run that is interrupted takes long to save: see `saved_slowly`.
    "checkpoint" in a note is the step of the checkpoint that was there when an interrupted run
    ended. At the end of another run rank 0 may still be writing it.
    """
    notes = []
    for item in plan:
        interrupt = item.get("interrupt")
        note = {"masks": [], "parameters": [], "seeds": [], "reductions": 0}
        watched = partial(watched_run, note, interrupt)
        save = saved_slowly if interrupt else save_tensors
        with (
            patch.object(train, "Run", watched),
            patch.object(resume, "save_tensors", save),
            patch.object(dist, "destroy_process_group"),
        ):
            note["status"] = train.main(item["flags"])
        note["checkpoint"] = step_of(Path(note["out"])) if interrupt else None
        notes.append(note)
    return notes


def work(argv):
    """Make the runs of argv[0]/plan.json as one rank; end with the status of the last run."""
    folder = Path(argv[0])
    notes = make(json.loads((folder / "plan.json").read_text()))
    (folder / f"notes-{os.environ['RANK']}.json").write_text(json.dumps(notes))
    if dist.is_initialized():
        dist.destroy_process_group()
    # After ten runs in one process the exit of Python aborted once in about ten times ("terminate
    # called without an active exception", a thread of torch), when all was done.
    os._exit(notes[-1]["status"])


# -------------------------------------------------------------------------------------------------
# starting two of them


def environment(**more):
    """The environment of a process that imports the program and computes with one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def statuses_of(processes):
    """The exit statuses of processes, after all have ended."""
    try:
        return [process.wait(timeout=LOST) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def notes_of(folder):
    """The notes of both ranks."""
    return [json.loads((folder / f"notes-{rank}.json").read_text()) for rank in (0, 1)]


def make_with_two(plan, folder, machines=()):
    """Make the runs of a plan with two processes; return the notes of both.

    `machines` are two folders, which stand for two machines. Each process then works in one of
    them, has its cache there, and is the first process of its machine.
    """
    (folder / "plan.json").write_text(json.dumps(plan))
    port = str(free_port())
    processes = []
    for rank in (0, 1):
        here = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        here |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        cwd = ROOT
        if machines:
            cwd = machines[rank]
            here |= {"LOCAL_RANK": "0", "NANOPRUNE_CACHE": str(cwd / "cache")}
        processes.append(Fork(["test_processes:work", folder], env=here, cwd=cwd))
    assert statuses_of(processes) == [0, 0]
    return notes_of(folder)


def make_with_one(plan, folder):
    """Make the runs of a plan with one process; return its notes."""
    (folder / "plan.json").write_text(json.dumps(plan))
    process = Fork(["test_processes:work", folder], env=environment(RANK="0"))
    assert statuses_of([process]) == [0]
    return json.loads((folder / "notes-0.json").read_text())


def make_with_torchrun(plan, folder):
    """Do the same with two processes that torchrun starts."""
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(folder)]
    launcher = subprocess.Popen(command, env=environment())
    try:
        launcher.wait(timeout=LOST)
    finally:
        launcher.terminate()  # it ends its workers, too
        launcher.wait()
    return notes_of(folder)


# -------------------------------------------------------------------------------------------------
# what a run folder tells


def flags_of(**options):
    """Command-line flags: max_steps=2 becomes ["--max-steps", "2"]."""
    flags = []
    for name, value in options.items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    return flags


def rows_with(out, key):
    """The rows of a run's log that have `key`."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def losses_of(out):
    """The logged losses of a run, in order."""
    return np.array([row["loss"] for row in rows_with(out, "loss")])


def result_of(out):
    return json.loads((out / "result.json").read_text())


def step_of(out):
    """The step of a run's checkpoint, or None without one."""
    path = out / "checkpoint.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["progress"])["step"]


@pytest.fixture
def hangup():
    """Put back what this process does at SIGHUP."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


# -------------------------------------------------------------------------------------------------
# two processes are one


# The batches have 20 of the 203 examples, in two micro-batches. One batch of an epoch has 3: two
# micro-batches on rank 0, but a single example on rank 1. An epoch has 11 batches.
STEPS = 13
SAME = {
    "dense": {"method": "dense"},
    "smp-s": {"method": "smp-s"},
    "soft-movement": {"method": "soft-movement"},
    "l0": {"method": "l0"},
    "pins": {"method": "pins", "teacher": "none"},
    "self-teacher": {"method": "pins", "teacher": "self", "eval_every": 1, "lr": 3e-4, "seed": 1},
    "teacher": {"method": "smp-s"},
    "span": {"method": "pins", "teacher": "self", "eval_every": 4},
    "tag": {"method": "smp-s", "teacher": "self", "eval_every": 4},
    "texts": {"method": "pins", "teacher": "self", "eval_every": 4},
    "llama": {"method": "smp-s", "eval_every": 4, "hold": 0, "ramp": 1},
    "one-example": {"method": "dense", "batch_size": 101, "max_steps": 3},
    "headless": {"method": "smp-s"},
    "from-headless": {"method": "fixed"},
}
KINDS = ("span", "tag")  # runs of a task of this kind
HEADLESS = ("headless", "from-headless")  # runs of a model with a pooler and without an MLM head


def begin(background, fixture):
    """Start the runs of SAME: (a folder, the future of the notes of two processes).

    The folder gets 1/NAME, which one process made, and 2/NAME, which two made.
    """
    folder = fixture("tmp_path_factory").mktemp("both")
    plans = []
    model = without_mlm_head(fixture("tiny")[1], folder / "model")
    for world in ("1", "2"):
        (folder / world).mkdir()
        plan = []
        for name, changes in SAME.items():
            options = {"batch_size": 20, "max_steps": STEPS, "grad_accum": 2}
            options |= {"dropout": 0, "lr": 1e-3}
            options |= changes
            if name == "teacher":
                options["teacher"] = folder / "1" / "dense"
            if name in KINDS:
                options["task_file"] = fixture("kinds")[name]
            if name in HEADLESS:
                options["model"] = model
            if name == "from-headless":
                options["from"] = folder / "1" / "headless"
            flags = flags_of(**options, out=folder / world / name)
            base = fixture(name if name in ("texts", "llama") else "tiny")
            plan.append({"flags": [*base, *flags]})
        plans.append(plan)
    return folder, background.call(make_both, plans, folder)


def without_mlm_head(model, folder):
    """Copy a model without its MLM head; it keeps its pooler. Return the folder of the copy."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.")}
    assert "bert.pooler.dense.weight" in tensors
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_both(plans, folder):
    """Make the runs of SAME with one process, then with two; return the notes of the two."""
    notes = make_with_one(plans[0], folder / "1")
    assert [note["status"] for note in notes] == [0] * len(SAME)
    return make_with_two(plans[1], folder / "2")


@pytest.fixture(scope="module")
def both(begun):
    """A folder with each run of SAME by one process, 1/NAME, and by two, 2/NAME; and the notes.

    The notes are those of rank 0 and of rank 1 of two processes, {name: note}.
    """
    folder, notes = begun
    return folder, [dict(zip(SAME, of_rank)) for of_rank in notes.result()]


@pytest.mark.parametrize("name", SAME)
def test_two_processes_are_one(both, name):
    """Two processes have the losses of one process, to 1e-5, at each step of an epoch and the next.

    This holds with micro-batches, also for a batch that gives one rank fewer micro-batches than
    the other, and for one that gives a rank no example at all. It holds with a dense teacher, and
    with a self-teacher that changes. It holds for a run from an SMP run whose model has a pooler
    that nothing reads.
    """
    folder, _ = both
    one = losses_of(folder / "1" / name)
    two = losses_of(folder / "2" / name)
    assert len(one) == len(two) == (3 if name == "one-example" else STEPS)
    print("largest difference of a loss:", np.abs(one - two).max())
    assert np.abs(one - two).max() < 1e-5
    results = [result_of(folder / world / name) for world in ("1", "2")]
    assert results[0]["achieved_density"] == results[1]["achieved_density"]
    taught = [rows_with(folder / world / name, "teacher") for world in ("1", "2")]
    assert taught[0] == taught[1]
    if name == "self-teacher":
        assert len(taught[0]) > 1


@pytest.mark.parametrize("name", SAME)
def test_both_ranks_have_the_same_model(both, name):
    """At every step the masks, and all parameters, of both ranks are equal bit for bit."""
    folder, (first, second) = both
    assert first[name]["masks"] == second[name]["masks"]
    assert first[name]["parameters"] == second[name]["parameters"]
    steps = result_of(folder / "2" / name)["steps"]
    assert len(set(first[name]["parameters"])) == steps
    if SAME[name]["method"] == "smp-s":
        assert len(set(first[name]["masks"])) > 8  # the masks do change


@pytest.mark.parametrize("name", SAME)
def test_gradients_travel_once_per_step(both, name):
    """The ranks average their gradients once per step, not once per micro-batch."""
    folder, notes = both
    steps = result_of(folder / "2" / name)["steps"]
    assert [note[name]["reductions"] for note in notes] == [steps, steps]


def test_dropout_differs_between_ranks(both):
    """No rank has the seed of another one, nor one seed for two steps."""
    _, notes = both
    seeds = [seed for note in notes for seed in note["dense"]["seeds"]]
    assert len(set(seeds)) == len(seeds) == 2 * STEPS


# -------------------------------------------------------------------------------------------------
# interruptions


# A loss is logged every third step. Both runs stop between two of these steps.
STOPPED = {"method": "pins", "pins_window": 2, "max_steps": 14, "eval_every": 5, "log_every": 3}
STOPPED |= {"dropout": 0, "lr": 1e-3}


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """The folder of a run that torchrun started, in which rank 1 got SIGTERM, and the notes."""
    folder = tmp_path_factory.mktemp("stopped")
    flags = [*tiny, *flags_of(**STOPPED, out=folder / "two")]
    notes = make_with_torchrun([{"flags": flags, "interrupt": [1, 6]}], folder)
    return folder / "two", [note for (note,) in notes]


def test_a_signal_to_one_rank_stops_all(stopped):
    """After SIGTERM to rank 1 in step 6 both ranks stop after step 8, with status 143.

    The ranks agree on it at every fourth step. No rank ends before the checkpoint of this step is
    written, because torchrun ends the other ranks soon after the first one.
    """
    out, notes = stopped
    assert [note["status"] for note in notes] == [TERMINATED, TERMINATED]
    assert notes[0]["masks"] == notes[1]["masks"]
    assert notes[0]["parameters"] == notes[1]["parameters"]
    assert [len(note["parameters"]) for note in notes] == [8, 8]
    assert [note["checkpoint"] for note in notes] == [8, 8]
    assert not (out / "result.json").exists()


def test_any_number_of_processes_resumes(tiny, stopped, tmp_path):
    """Resumed by two processes, a run of two ends as an unbroken one does.

    Parameters and metrics are equal bit for bit, and the logged losses to 1e-6. The losses are
    equal to 1e-5 when one process resumes it, and when two resume a run of one.
    """
    flags = [*tiny, *flags_of(**STOPPED), "--out"]
    two = shutil.copytree(stopped[0], tmp_path / "two")
    two_then_one = shutil.copytree(stopped[0], tmp_path / "two-then-one")
    one = tmp_path / "one"
    (note,) = make([{"flags": [*flags, str(one)], "interrupt": [0, 7]}])
    assert note["status"] == TERMINATED
    assert note["checkpoint"] == 7

    whole = tmp_path / "whole"
    plan = [{"flags": [*flags, str(whole)]}]
    plan += [{"flags": [*flags, str(out), "--resume"]} for out in (two, one)]
    for of_whole, of_two, of_one in make_with_two(plan, tmp_path):
        assert [of_whole["status"], of_two["status"], of_one["status"]] == [0, 0, 0]
        assert of_two["parameters"] == of_whole["parameters"][8:]
        assert len(of_one["parameters"]) == 7
    (note,) = make([{"flags": [*flags, str(two_then_one), "--resume"]}])
    assert note["status"] == 0

    expected = losses_of(whole)
    assert len(expected) == 5
    assert rows_with(two, "metrics") == rows_with(whole, "metrics")
    assert result_of(two)["best"] == result_of(whole)["best"]
    for out, gap in ((two, 1e-6), (two_then_one, 1e-5), (one, 1e-5)):
        print(out.name, losses_of(out) - expected)
        assert np.abs(losses_of(out) - expected).max() < gap


def test_machines_share_no_disk(tiny, tmp_path):
    """On two machines with folders of their own, rank 1 needs the model and the data, but no run.

    It writes nothing but its token cache. A run that was interrupted is resumed although rank 1 has
    no config.json and no checkpoint: it ends with the losses of one that was not.
    """
    machines = [tmp_path / "machine-0", tmp_path / "machine-1"]
    for machine in machines:
        shutil.copytree(Path(tiny[1]).parent, machine, ignore=shutil.ignore_patterns("data"))
    brought = {path.name for path in machines[0].iterdir()}
    flags = ["--model", "model", "--task-file", "task.json", "--data-dir", "data", *tiny[6:]]
    flags += flags_of(method="smp-s", max_steps=9, out="run")
    plan = [
        {"flags": flags, "interrupt": [0, 3]},
        {"flags": [*flags, "--resume"]},
        {"flags": [*flags, "--out", "whole"]},
    ]
    for notes in make_with_two(plan, tmp_path, machines):
        assert [note["status"] for note in notes] == [TERMINATED, 0, 0]
        stopped, resumed, whole = [note["parameters"] for note in notes]
        assert len(stopped) == 4
        assert stopped + resumed == whole
    first, second = [{path.name for path in machine.iterdir()} for machine in machines]
    assert first == brought | {"data", "run", "whole"}
    assert second == brought | {"data"}
    caches = [[path.name for path in (m / "data" / "cache").iterdir()] for m in machines]
    assert sorted(caches[0]) == sorted(caches[1])
    assert len(caches[0]) == 2  # train and dev
    run = losses_of(machines[0] / "run")
    whole = losses_of(machines[0] / "whole")
    assert len(run) == 9
    assert np.abs(run - whole).max() < 1e-6


def test_hangup(tiny, tmp_path, monkeypatch, hangup):
    """SIGHUP, which a closed terminal sends, stops a run after its step with status 129.

    --resume continues it. A run for which it is ignored, as nohup does, goes on to its end.
    """
    flags = [*tiny, "--method", "dense", "--max-steps", "5", "--out"]
    clip = torch.nn.utils.clip_grad_norm_
    calls = []

    def hung_up(*args):
        """Send the signal in the third step."""
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGHUP)
        return clip(*args)

    def unheard(number, frame):
        pytest.fail("the run does not listen to SIGHUP")

    out = tmp_path / "run"
    signal.signal(signal.SIGHUP, unheard)
    with monkeypatch.context() as during:
        during.setattr(torch.nn.utils, "clip_grad_norm_", hung_up)
        assert train.main([*flags, str(out)]) == 128 + signal.SIGHUP
        assert step_of(out) == 3
        assert not (out / "result.json").exists()
        calls.clear()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert train.main([*flags, str(tmp_path / "nohup")]) == 0
    assert train.main([*flags, str(out), "--resume"]) == 0
    assert len(losses_of(out)) == 5
    assert np.array_equal(losses_of(out), losses_of(tmp_path / "nohup"))


# -------------------------------------------------------------------------------------------------
# downloads


def test_processes_wait_for_a_long_download(monkeypatch):
    """The first process of a machine may take over an hour to download and tokenise.

    The others wait for it in a collective. By default gloo gives up after half an hour, and nccl
    after ten minutes.
    """
    joined = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: joined.append(kwargs))
    assert join_processes("cpu") == (1, 2, torch.device("cpu"))
    assert joined[0]["timeout"] > timedelta(hours=1)


class SlowServer(ThreadingHTTPServer):
    """A server that sends the second half of a file only after it was asked for it twice."""

    def __init__(self, content):
        self.content = content
        self.twice = threading.Barrier(2)
        super().__init__(("127.0.0.1", 0), SlowHandler)


class SlowHandler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        content = self.server.content
        half = len(content) // 2
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:half])
        self.wfile.flush()
        with suppress(threading.BrokenBarrierError):  # where one program waits for the other
            self.server.twice.wait(timeout=20)
        self.wfile.write(content[half:])


def prepare_toy(argv):
    """Download and read a task whose zip has the hash argv[1], into the folder argv[0]."""
    folder, sha256 = argv
    sources = (("glue/data/Toy.zip", sha256),)
    options = {"columns": ("text",), "rows": (3, 3, 3), "sources": sources}
    prepare(Task("toy", "Toy", ("bad", "good"), **options), folder)


def test_two_processes_download_the_same_file(tmp_path):
    """Two processes that download one file at the same time both end with whole files.

    No other file remains.
    """
    text = "text\tlabel\nthe cat\t0\nthe dog\t1\na cow\t0\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for split in ("train", "dev", "test"):
            zipped.writestr(f"Toy/{split}.tsv", text)
    content = buffer.getvalue()
    server = SlowServer(content)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    folder = tmp_path / "data"
    here = environment(GLUE_URL=f"http://127.0.0.1:{server.server_port}")
    argv = ["test_processes:prepare_toy", folder, hashlib.sha256(content).hexdigest()]
    assert statuses_of([Fork(argv, env=here) for _ in range(2)]) == [0, 0]
    server.shutdown()
    server.server_close()
    assert (folder / "Toy.zip").read_bytes() == content
    for split in ("train", "dev", "test"):
        assert (folder / "Toy" / f"{split}.tsv").read_text() == text
    assert sorted(path.name for path in folder.rglob("*.*")) == [
        "Toy.zip",
        "dev.tsv",
        "test.tsv",
        "train.tsv",
    ]


if __name__ == "__main__":
    work(sys.argv[1:])
