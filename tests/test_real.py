"""Whole runs with a real BERT (BERT_DIR) on real data (GLUE_DIR).

They show what the tiny model and task cannot show.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from data import TASKS
from models.checkpoint import load_model
from prune import mask_matrices
from tools import bench, deploy

GLUE_DIR = os.environ.get("GLUE_DIR", "")
BERT_DIR = os.environ.get("BERT_DIR", "")
SQUAD_DIR = os.environ.get("SQUAD_DIR", "")
CONLL_DIR = os.environ.get("CONLL_DIR", "")
missing = not (GLUE_DIR and BERT_DIR)
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(missing, reason="needs GLUE_DIR and BERT_DIR"),
]
ROOT = Path(train.__file__).parent
FLAGS = ["--model", BERT_DIR, "--data-dir", GLUE_DIR, "--device", "cpu"]


def environment(**more):
    """The environment of a process that runs the program with one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def test_what_is_masked():
    """MiniLM-L6-H384 has 36 masked matrices with 10,616,832 weights in all."""
    model = load_model(BERT_DIR, "words", words=[2053, 2748])
    masked = mask_matrices(model)
    weights = 0
    for letter in model.matrices:
        assert len(masked[letter]) == 6
        weights += sum(linear.weight.numel() for linear in masked[letter])
    assert weights == 10_616_832


def first_questions(folder):
    """A task file with the questions of two real paragraphs."""
    rows = json.loads(Path(SQUAD_DIR, "dev-part.json").read_text())
    rows["data"] = [{"paragraphs": rows["data"][0]["paragraphs"][:2]}]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "dev.json").write_text(json.dumps(rows))
    task = {"name": "s", "kind": "span", "train": "train.json", "dev": "dev.json"}
    return task | {"words": ["yes", "no"], "metric": "f1"}


def first_sentences(folder):
    """A task file with 100 real sentences."""
    text = Path(CONLL_DIR, "eng.testa").read_text()
    text = "\n\n".join(text.split("\n\n")[:100])
    (folder / "train.txt").write_text(text)
    (folder / "dev.txt").write_text(text)
    words = TASKS["conll2003"].words
    task = {"name": "t", "kind": "tag", "train": "train.txt", "dev": "dev.txt", "words": words}
    return task | {"labels": TASKS["conll2003"].labels, "metric": "entity_f1"}


@pytest.mark.parametrize("kind", ["classify", "span", "tag"])
def test_two_processes_are_one_at_first(kind, tmp_path):
    """Over the first steps two processes have the losses of one process, to 1e-5.

    The masks of both processes are equal bit for bit. Questions and sentences have a self-teacher.
    """
    flags = [*FLAGS, "--dropout", "0", "--max-steps", "5", "--log-every", "1"]
    flags += ["--batch-size", "16"]
    flags += ["--dtype", "fp32"]  # in bf16 the two halves of a batch round differently
    if kind == "classify":
        flags += ["--task", "rte", "--max-length", "64"]
    else:
        if not Path(SQUAD_DIR or "missing").is_dir() or not Path(CONLL_DIR or "missing").is_dir():
            pytest.skip("needs SQUAD_DIR and CONLL_DIR")
        task = {"span": first_questions, "tag": first_sentences}[kind](tmp_path)
        (tmp_path / "task.json").write_text(json.dumps(task))
        flags += ["--task-file", str(tmp_path / "task.json"), "--teacher", "self"]
        flags += ["--eval-every", "2", "--max-length", "96"]
    worker = Path(__file__).with_name("test_processes.py")
    losses = {}
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        out = folder / "run"
        plan = [{"flags": [*flags, "--out", str(out)]}]
        (folder / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(n), str(worker), str(folder)]
        subprocess.run(command, env=environment(), check=True)
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[n] = np.array([row["loss"] for row in log if "loss" in row])
    first, second = [json.loads((folder / f"notes-{rank}.json").read_text()) for rank in (0, 1)]
    assert first[0]["masks"] == second[0]["masks"]
    gap = np.abs(losses[1] - losses[2])
    print("loss difference by step:", gap)
    assert len(gap) == 5
    taught = [row["step"] for row in log if "teacher" in row]
    assert bool(taught) == (kind != "classify")
    assert gap.max() < 1e-5


def test_killed_thrice_is_uninterrupted(tmp_path):
    """A run on CoLA, killed (kill -9) three times and resumed, ends as an unbroken run does.

    The metrics, scores and masks are equal bit for bit.
    """
    flags = ["--task", "cola", "--batch-size", "16", "--max-steps", "32"]
    flags += ["--eval-every", "16", "--log-every", "4"]
    command = [sys.executable, str(ROOT / "train.py"), *FLAGS, *flags, "--out"]
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    began = time.time()
    subprocess.run([*command, str(whole)], env=environment(), check=True)
    seconds = time.time() - began
    resume = [*command, str(killed), "--resume"]
    for _ in range(3):
        process = subprocess.Popen(resume, env=environment())
        time.sleep(random.uniform(0.5, 0.75) * seconds)
        process.kill()
        process.wait()
    subprocess.run(resume, env=environment(), check=True)
    a = json.loads((whole / "result.json").read_text())
    b = json.loads((killed / "result.json").read_text())
    for key in ("metrics", "best", "achieved_density"):
        assert a[key] == b[key]
    a = load_file(whole / "scores.safetensors")
    b = load_file(killed / "scores.safetensors")
    assert a.keys() == b.keys()
    assert len(a) == 72
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("method", ["dense", "smp-s", "pins"])
def test_bench_times_a_step_that_trains(method, capsys):
    """The step that tools/bench.py times runs, and its ratio to itself is printed.

    No test says how long it may take, because these machines are noisy.
    """
    device = torch.device("cpu")
    batch = bench.synthetic(16, size=4)
    step = bench.our_step(method, "minilm", device, "fp32")
    seconds = deploy.alternate([lambda: step(batch), lambda: step(batch)], device, 1, warm=1)
    assert seconds.shape == (1, 2)
    assert bench.show(f"step, {method}", seconds, (method, method)) > 0
    assert f"step, {method}" in capsys.readouterr().out
