"""Half precision: what the loss scaler does in fp16, and that a run keeps the dtype it began with.

fp16 runs on the CPU here, with the same GradScaler that a GPU has.
"""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import prune
import train
from kinds.classify import Classify
from models.checkpoint import parse_safetensors
from support.machine import pick_dtype


def losses_of(out):
    """The logged losses of a run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def run(tiny, out, *flags):
    """Run train.py in this process; return its exit status."""
    return train.main([*tiny, "--out", str(out), *flags])


def spoil_gradients(patch, steps, value):
    """Put `value` into a gradient before the scaler looks at it, in these steps from 0."""
    unscale = torch.amp.GradScaler.unscale_
    calls = []

    def spoiled(self, optimizer):
        if len(calls) in steps:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = value
        calls.append(1)
        return unscale(self, optimizer)

    patch.setattr(torch.amp.GradScaler, "unscale_", spoiled)


def gradient_norms(tiny, out, dtype, patch):
    """The norms of the gradients that a dense method observes in three steps."""
    norms = []

    def observe(self, step, lr):
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    with patch.context() as inner:
        inner.setattr(prune.Dense, "observe", observe)
        flags = ["--method", "dense", "--dtype", dtype, "--max-steps", "3", "--dropout", "0"]
        assert run(tiny, out, *flags, "--clip", "1e9", "--lr", "1e-5") == 0
    return norms


def test_fp16_gradients_are_unscaled_before_they_are_seen(tiny, tmp_path, monkeypatch):
    """A method observes the gradients of fp16 in the size that they have in fp32, to 2%.

    The scaler multiplies the loss by 65,536. Without `unscale_` they would be as much larger.
    """
    half = gradient_norms(tiny, tmp_path / "fp16", "fp16", monkeypatch)
    full = gradient_norms(tiny, tmp_path / "fp32", "fp32", monkeypatch)
    assert len(half) == len(full) == 3
    for a, b in zip(half, full, strict=True):
        assert a == pytest.approx(b, rel=0.02)
    assert half != full  # it was really computed in half precision


def test_an_infinite_gradient_skips_its_step(tiny, tmp_path, monkeypatch):
    """With an infinity in the gradient of step 2 nothing is trained in this step, and the run ends.

    The scaler halves its scale, which the checkpoint remembers.
    """
    weights = []
    update = prune.Dense.update

    def noted(self, step):
        update(self, step)
        weights.append(self.model.classifier.weight.detach().clone())

    monkeypatch.setattr(prune.Dense, "update", noted)
    spoil_gradients(monkeypatch, {2}, float("inf"))
    flags = ["--method", "dense", "--dtype", "fp16", "--max-steps", "5", "--grad-accum", "2"]
    assert run(tiny, tmp_path / "out", *flags) == 0
    changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False)]
    assert changed[1:] == [True, False, True, True]  # the learning rate of step 0 is 0
    header = parse_safetensors(
        (tmp_path / "out" / "checkpoint.safetensors").read_bytes(), "checkpoint"
    )[1]
    assert json.loads(header["progress"])["scaler"]["scale"] == 32_768


def test_a_nan_in_each_step_stops_the_run(tiny, tmp_path, monkeypatch, capsys):
    """A run that skips every step stops after 17 of them, and does not end with status 0."""
    spoil_gradients(monkeypatch, set(range(100)), float("nan"))
    flags = ["--method", "dense", "--dtype", "fp16", "--max-steps", "40", "--eval-every", "30"]
    assert run(tiny, tmp_path / "out", *flags) == 2
    assert "NaN or infinite at step 17" in capsys.readouterr().err
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_nan_loss_of_any_micro_batch_stops_the_run(tiny, tmp_path, monkeypatch, capsys):
    """In fp16 a NaN in the first of two micro-batches of step 3 is seen, not only in the last."""
    losses = Classify.losses
    calls = []

    def poisoned(*args):
        calls.append(1)
        return losses(*args) * (float("nan") if len(calls) == 7 else 1.0)

    monkeypatch.setattr(Classify, "losses", poisoned)
    flags = ["--method", "dense", "--dtype", "fp16", "--max-steps", "9", "--grad-accum", "2"]
    assert run(tiny, tmp_path / "out", *flags) == 2
    assert "NaN or infinite at step 3" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_dtype(tiny, tmp_path, monkeypatch):
    """ "auto" is decided once: a run that began in bf16 goes on in bf16, whatever the machine says.

    It ends bit for bit like an uninterrupted run in bf16.
    """
    update = prune.SMPShared.update

    def interrupted(self, step):
        update(self, step)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    flags = ["--method", "smp-s", "--max-steps", "8", "--dtype"]
    assert run(tiny, tmp_path / "whole", *flags, "bf16") == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "pick_dtype", lambda device: "bf16")
        patch.setattr(prune.SMPShared, "update", interrupted)
        assert run(tiny, tmp_path / "out", *flags, "auto") == 128 + signal.SIGTERM
    monkeypatch.setattr(train, "pick_dtype", lambda device: "fp32")
    assert train.main(["--out", str(tmp_path / "out"), "--resume"]) == 0
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "whole")
    ours, theirs = [load_file(tmp_path / f / "scores.safetensors") for f in ("out", "whole")]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_gpu_that_emulates_bf16_computes_in_fp16(monkeypatch):
    """T4, V100 and RTX 20 report bf16 only if emulation counts, and are slow in it."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert pick_dtype(torch.device("cuda")) == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert pick_dtype(torch.device("cuda")) == "bf16"


def test_a_run_that_misses_its_density_says_so(tiny, tmp_path, capsys):
    """Two steps are too few to steer soft movement to 0.03: train.py and eval.py both say so."""
    out = tmp_path / "out"
    flags = ["--method", "soft-movement", "--density", "0.03", "--max-steps", "2"]
    assert run(tiny, out, *flags) == 0
    warning = "warning: density"
    assert warning in capsys.readouterr().err
    assert evaluation.main([str(out), "--data-dir", tiny[5]]) == 0
    assert warning in capsys.readouterr().err
    assert run(tiny, tmp_path / "met", "--method", "smp-l", "--max-steps", "2") == 0
    assert warning not in capsys.readouterr().err
