"""Whole runs on real data with a real BERT (GLUE_DIR, BERT_DIR): what tiny made-up ones cannot show."""

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

import bench
import train
from model import load_model
from prune import MATRICES, mask_layers

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (os.environ.get("GLUE_DIR") and os.environ.get("BERT_DIR")), reason="needs GLUE_DIR and BERT_DIR"
    ),
]
ROOT = Path(train.__file__).parent
FLAGS = ["--model", os.environ.get("BERT_DIR", ""), "--data-dir", os.environ.get("GLUE_DIR", ""), "--device", "cpu"]


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def test_what_is_masked():
    """MiniLM-L6-H384: 36 matrices, 10,616,832 weights."""
    masked = mask_layers(load_model(os.environ["BERT_DIR"], "words", words=[2053, 2748]).bert.encoder["layer"])
    assert [len(masked[letter]) for letter in MATRICES] == [6] * 6
    assert sum(m.weight.numel() for column in masked.values() for m in column) == 10_616_832


def test_two_processes_are_one_at_first(tmp_path):
    """The loss of one process to 1e-5 over the first steps; masks bit-identical on both ranks."""
    flags = [*FLAGS, "--task", "rte", "--dropout", "0", "--max-steps", "5", "--log-every", "1", "--batch-size", "16"]
    flags += ["--dtype", "fp32"]  # two halves of a batch round otherwise in bf16
    worker, runs = Path(__file__).with_name("test_train.py"), {}
    for n in (1, 2):
        port = ["--master-port", str(random.randint(20000, 60000))]
        command = [sys.executable, "-m", "torch.distributed.run", *port, "--nproc-per-node", str(n), str(worker)]
        subprocess.run(
            [*command, *flags, "--out", str(tmp_path / str(n))], env=environment(MASK_LOG=str(tmp_path)), check=True
        )
        log = [json.loads(line) for line in (tmp_path / str(n) / "metrics.jsonl").read_text().splitlines()]
        runs[n] = np.array([row["loss"] for row in log if "loss" in row])
    ranks = [(tmp_path / f"masks-2-{rank}").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    gap = np.abs(runs[1] - runs[2])
    print("loss difference by step:", gap)
    assert len(gap) == 5 and gap.max() < 1e-5


def test_killed_thrice_is_uninterrupted(tmp_path):
    """kill -9 at three random moments of a run on CoLA: metrics, scores and masks bit-identical to the whole run."""
    flags = ["--task", "cola", "--batch-size", "16", "--max-steps", "40", "--eval-every", "8", "--log-every", "4"]
    command = [sys.executable, str(ROOT / "train.py"), *FLAGS, *flags, "--out"]
    began = time.time()
    subprocess.run([*command, str(tmp_path / "whole")], env=environment(), check=True)
    whole = time.time() - began
    for _ in range(3):
        process = subprocess.Popen([*command, str(tmp_path / "killed"), "--resume"], env=environment())
        time.sleep(random.uniform(0.3, 0.7) * whole)
        process.kill()
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed"), "--resume"], env=environment(), check=True)
    a, b = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed"))
    assert a["metrics"] == b["metrics"] and a["best"] == b["best"] and a["achieved_density"] == b["achieved_density"]
    a, b = (load_file(tmp_path / name / "scores.safetensors") for name in ("whole", "killed"))
    assert a.keys() == b.keys() and len(a) == 72 and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("length", "most"), [(128, 1.15), (40, 1.3)])
def test_step_time(length, most, capsys):
    """A SMP-S step over a dense fine-tuning step (everything trained, fused AdamW), fp32, batch 32, in turn."""
    device, batch = torch.device("cpu"), bench.synthetic(length)
    smp, dense = (bench.our_step(method, "minilm", device, "fp32") for method in ("smp-s", "dense"))
    seconds = bench.alternate([lambda: smp(batch), lambda: dense(batch)], device, 7)
    with capsys.disabled():
        print()
        assert bench.show(f"step, smp-s / dense, length {length}, fp32", seconds, ("smp-s", "dense")) <= most
