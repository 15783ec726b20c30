"""Figures computed by running the authors' released code (40 training steps each), against ours."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
from model import load_model, task_loss
from prune import METHODS, MaskedLinear, density_at, distill, penalty_at
from train import lr_at

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def batch(step):
    data = golden("batches")
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: torch.from_numpy(data[name][step]) for name in names}
    return inputs, torch.from_numpy(data["labels"][step]), torch.from_numpy(data["teacher_logits"][step])


def test_dense_forward():
    model = load_model(GOLDEN / "tiny-bert", "words", words=[5])
    model.eval()
    inputs, _, _ = batch(0)
    expected = golden("dense_forward")
    assert np.abs(model.bert(**inputs).detach().numpy() - expected["hidden"]).max() < 1e-5
    assert np.abs(model.mlm_logits(**inputs).detach().numpy() - expected["mlm_logits"]).max() < 1e-5


# name, settings: N = ramp * 40 steps; the release neither caps nor redistributes shares
RUNS = {
    "smp_l_0.03_kd": {"density": 0.03},
    "smp_l_0.10": {"density": 0.1},
    "smp_l_0.10_lambda40000": {"density": 0.1, "reg_lambda": 40_000.0},
    "smp_s_0.10": {"density": 0.1},
    "smp_s_0.10_kd": {"density": 0.1},
    "smp_s_0.50_p3": {"density": 0.5, "temperature_s": 3.0},
    "smp_s_0.80_shift": {"density": 0.8, "ramp": 12 / 40},
}


@pytest.mark.parametrize("name", RUNS)
def test_smp_run(name):
    expected, steps = golden(name), 40
    settings = {"ramp": 30 / 40, "reg_lambda": 400.0, "temperature_s": 1.0, "score_lr": 2e-2, "redistribute": False}
    settings = SimpleNamespace(**settings | RUNS[name])
    words = golden("batches")["label_words"].tolist()
    # in float64, since Adam's first step, g / (|g| + 1e-8), is all rounding where g is about 1e-8, as one here is
    model = load_model(GOLDEN / "tiny-bert", "words", words=words).double()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    method = METHODS[name[:5].replace("_", "-")](model, settings, steps)
    modules = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, MaskedLinear)}
    with torch.no_grad():
        for key, module in modules.items():
            shift = {"0": 1.5, "1": 0.0, "2": -1.5}[key.split(".")[3]] if name.endswith("shift") else 0.0
            module.scores.copy_(torch.from_numpy(golden("scores_init")[key]) + shift)
    optimizer = torch.optim.AdamW(method.groups())
    clipped = 0
    for step in range(steps):
        method.update(step)
        inputs, labels, teacher = batch(step)
        logits = model(**inputs)
        ce = task_loss(logits, labels, 0, 1)
        loss = ce
        if "kd" in name:
            loss = distill(ce, logits, teacher.double())
            assert abs(float((2 * loss - ce).mean()) - expected["kd"][step]) < 1e-4
        loss.mean().backward()
        regulariser = method.penalise(step)
        norm = torch.nn.utils.clip_grad_norm_([m.scores for m in modules.values()], 1.0)
        clipped += float(norm) > 1
        optimizer.param_groups[0]["lr"] = settings.score_lr * lr_at(step, steps, 0.0)

        assert abs(method.density(step) - expected["density"][step]) < 1e-6
        assert abs(penalty_at(step, settings.reg_lambda, steps) - expected["reg_lambda"][step]) < 1e-6
        assert abs(optimizer.param_groups[0]["lr"] - expected["lr"][step]) < 1e-6
        assert abs(float(ce.detach().mean()) - expected["ce"][step]) < 1e-4
        assert abs(float(regulariser) - expected["reg"][step]) < 1e-4
        assert abs(float(norm) - expected["gradnorm"][step]) < 1e-3 * max(1, expected["gradnorm"][step])
        if "_s_" in name:
            shares = np.array(method.shares(method.density(step))).reshape(6, 3).T  # (6, L) -> (L, 6)
            assert np.abs(shares - np.minimum(expected["alloc"][step], 1)).max() < 1e-6
        optimizer.step()
        optimizer.zero_grad()
    method.update(steps)
    assert clipped > 0 or "lambda40000" not in name  # that run is there to see clipping act
    for key, module in modules.items():
        assert np.abs(module.scores.detach().numpy() - expected[f"scores/{key}"]).max() < 5e-3
    kept = dict(zip(expected["kept_names"].tolist(), expected["kept"].tolist(), strict=True))
    assert {key: int(m.mask.sum()) for key, m in modules.items()} == kept
    final = model.eval()(**batch(0)[0]).detach().numpy()
    assert np.abs(final - expected["final_logits"]).max() < 1e-3
    for key, tensor in model.state_dict().items():  # nothing but scores has moved, not by a bit
        assert key.endswith(".scores") or torch.equal(tensor, before[key])


def test_schedule():
    """The value of the movement code's schedule run as SMP runs it: no warm-up, the last 400 of 1000 steps flat."""
    expected = golden("schedules")["smp/value"]
    assert max(abs(density_at(t, 0.03, 600) - v) for t, v in enumerate(expected)) < 1e-6


def test_regulariser():
    expected = golden("regularizers")
    assert abs(float(torch.sigmoid(torch.from_numpy(expected["scores"])).mean()) - expected["l1"]) < 1e-6


def test_glue_metrics():
    expected = golden("glue_metrics")
    for key in expected.files:
        group, name = key.split("/")
        if name in evaluation.METRICS:
            ours = evaluation.METRICS[name](expected[f"{group}/preds"], expected[f"{group}/labels"])
            assert abs(ours - expected[key]) < 1e-9, key
