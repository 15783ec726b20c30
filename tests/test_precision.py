"""Half precision: what the loss scaler does in fp16, and that a run keeps the dtype it began with.

fp16 runs on the CPU here, with the same GradScaler that a GPU has.
"""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_errors import refused

import eval as evaluation
import prune
import train
from kinds.classify import Classify
from models.checkpoint import load_model, save_model
from support.machine import pick_dtype
from support.tensors import parse_safetensors


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_step_counts_as_importance_0(value, tiny, tmp_path, monkeypatch):
    """The other nine steps of its window still tell which weights matter."""
    measured = {}
    observe = prune.Sensitivity.observe

    def noted(self, step, lr):
        observe(self, step, lr)
        measured[step] = self.importance().clone()

    monkeypatch.setattr(prune.Sensitivity, "observe", noted)
    spoil_gradients(monkeypatch, {13}, value)
    flags = ["--method", "sensitivity", "--dtype", "fp16", "--ramp", "0.5"]
    assert run(tiny, tmp_path / "out", *flags) == 0
    for step in (10, 20):
        assert measured[step].isfinite().all()
        assert (measured[step] > 0).float().mean() > 0.9


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

    It ends bit for bit like an uninterrupted run in bf16. Its frozen matrices are in bf16, too.
    """
    update = prune.SMPShared.update

    def interrupted(self, step):
        update(self, step)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    flags = ["--method", "smp-s", "--max-steps", "8", "--frozen-dtype", "bf16", "--dtype"]
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


def rounded_folder(source, folder, names):
    """A copy of a model whose matrices with one of `names` in their own are rounded to bf16."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and any(part in name for part in names):
            tensors[name] = tensor.bfloat16().float()
    save_file(tensors, path, {"format": "pt"})


def check_frozen_in_bf16(flags, tmp_path, method, names):
    """A run with frozen matrices in bf16 equals one in float32 of a model with rounded ones.

    `names` are parts of the names of the matrices that are frozen.
    """
    model = load_model(flags[1], *forms_of(flags))
    save_model(tmp_path / "first", model, model.state_dict(), ())
    for path in Path(flags[1]).iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            shutil.copy(path, tmp_path / "first")
    rounded_folder(tmp_path / "first", tmp_path / "rounded", names)
    flags = [*flags[2:], "--method", method, "--dtype", "bf16", "--max-steps", "10"]
    flags += ["--density", "0.3", "--eval-every", "5"]
    for name, more in (("first", ["--frozen-dtype", "bf16"]), ("rounded", [])):
        out = tmp_path / f"run-{name}"
        assert train.main(["--model", str(tmp_path / name), *flags, "--out", str(out), *more]) == 0
    ours, theirs = [tmp_path / f"run-{name}" for name in ("first", "rounded")]
    for file in ("scores.safetensors", "model/model.safetensors"):
        a, b = load_file(ours / file), load_file(theirs / file)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name]), name
    assert losses_of(ours) == losses_of(theirs)
    before, after = [load_file(tmp_path / f / "model.safetensors") for f in ("first", "rounded")]
    assert any(not torch.equal(before[name], after[name]) for name in before)


def forms_of(flags):
    """The arguments of `load_model` that fit the model of these flags."""
    config = json.loads((Path(flags[1]) / "config.json").read_text())
    if config.get("model_type", "bert") == "bert":
        return "words", 2, [1, 2]
    return "vocabulary", 0, (), 0, None, True, "vocabulary"


@pytest.mark.parametrize("method", ["smp-s", "movement"])
@pytest.mark.parametrize("flags", ["tiny", "texts"])
def test_frozen_matrices_in_bf16(flags, method, request, tmp_path):
    names = ["embeddings", "wte", "wpe"] if method == "movement" else [""]
    check_frozen_in_bf16(request.getfixturevalue(flags), tmp_path, method, names)


def test_frozen_matrices_need_a_run_in_bf16(tiny, tmp_path, capsys):
    flags = ["--frozen-dtype", "bf16", "--out", tmp_path / "out"]
    refused(capsys, [*tiny, *flags, "--method", "smp-s"], "--frozen-dtype", "fp32", "--dtype bf16")
    refused(capsys, [*tiny, *flags, "--method", "dense"], "--frozen-dtype", "dense")


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
