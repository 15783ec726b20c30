"""Our code gives the numbers that the authors' released code gave when it was run on the same data.

The files in tests/golden hold those numbers. Most runs take 40 training steps, PINS takes 120.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import TASKS, kind_of
from kinds.classify import Classify
from kinds.score import Score
from model import MATRICES, Bert, BertConfig
from models.checkpoint import load_model
from models.teacher import distill, self_distill
from prune import METHODS, HardConcreteLinear, MaskedLinear, add_penalty
from support.schedules import cubic_at, lr_at

GOLDEN = Path(__file__).parent / "golden"
KIND = kind_of(TASKS["mnli"])  # classes


def golden(name):
    """The recorded arrays of tests/golden/NAME.npz, by name."""
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def batch(step):
    """The recorded batch of a step: the model's inputs, the labels, the teacher's logits."""
    data = golden("batches")
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: torch.from_numpy(data[name][step]) for name in names}
    return (
        inputs,
        torch.from_numpy(data["labels"][step]),
        torch.from_numpy(data["teacher_logits"][step]),
    )


def test_dense_forward():
    """The hidden states and MLM logits of an unmasked BERT are those of the release."""
    model = load_model(GOLDEN / "tiny-bert", "words", words=[5])
    model.eval()
    inputs, _, _ = batch(0)
    expected = golden("dense_forward")
    assert np.abs(model.bert(**inputs).detach().numpy() - expected["hidden"]).max() < 1e-5
    assert np.abs(model.mlm_logits(**inputs).detach().numpy() - expected["mlm_logits"]).max() < 1e-5


# Settings of each recorded run. The density falls for ramp * 40 steps.
# The release neither caps shares at 1 nor redistributes what a full matrix cannot take.
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
    """40 training steps of SMP give the release's losses, gradients, densities, scores and masks.

    Nothing but the scores changes.
    """
    expected, steps = golden(name), 40
    settings = {
        "ramp": 30 / 40,
        "reg_lambda": 400.0,
        "temperature_s": 1.0,
        "score_lr": 2e-2,
        "redistribute": False,
    }
    settings |= {"hold": 0.0, "lr": 0.0, "weight_decay": 0.0, "pattern": "weight"}
    settings = SimpleNamespace(**settings | RUNS[name])
    words = golden("batches")["label_words"].tolist()
    # In float64. Adam's first step is g / (|g| + 1e-8), and one gradient here is about 1e-8, so
    # that float32 would give mere rounding errors there.
    model = load_model(GOLDEN / "tiny-bert", "words", words=words).double()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    method = METHODS[name[:5].replace("_", "-")](model, settings, steps)
    modules = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, MaskedLinear)}
    with torch.no_grad():
        for key, module in modules.items():
            shift = (
                {"0": 1.5, "1": 0.0, "2": -1.5}[key.split(".")[3]]
                if name.endswith("shift")
                else 0.0
            )
            module.scores.copy_(torch.from_numpy(golden("scores_init")[key]) + shift)
    optimizer = torch.optim.AdamW(method.groups())
    clipped = 0
    for step in range(steps):
        method.update(step)
        inputs, labels, teacher = batch(step)
        logits = model(**inputs)
        ce = KIND.losses(logits, labels)
        loss = ce
        if "kd" in name:
            loss = distill(ce, logits, teacher.double())
            assert abs(float((2 * loss - ce).detach().mean()) - expected["kd"][step]) < 1e-4
        loss.mean().backward()
        regulariser = method.penalise(step)
        norm = torch.nn.utils.clip_grad_norm_([m.scores for m in modules.values()], 1.0)
        clipped += bool(norm > 1)
        optimizer.param_groups[0]["lr"] = settings.score_lr * lr_at(step, steps, 0.0)

        assert abs(method.density(step) - expected["density"][step]) < 1e-6
        assert (
            abs(cubic_at(step, 0.0, settings.reg_lambda, 0, steps) - expected["reg_lambda"][step])
            < 1e-6
        )
        assert abs(optimizer.param_groups[0]["lr"] - expected["lr"][step]) < 1e-6
        assert abs(float(ce.detach().mean()) - expected["ce"][step]) < 1e-4
        assert abs(float(regulariser) - expected["reg"][step]) < 1e-4
        assert abs(float(norm) - expected["gradnorm"][step]) < 1e-3 * max(
            1, expected["gradnorm"][step]
        )
        if "_s_" in name:
            shares = (
                np.array(method.shares(method.density(step))).reshape(6, 3).T
            )  # (6, L) -> (L, 6)
            assert np.abs(shares - np.minimum(expected["alloc"][step], 1)).max() < 1e-6
        optimizer.step()
        optimizer.zero_grad()
    method.update(steps)
    assert clipped > 0 or "lambda40000" not in name  # this run is there to see clipping act
    for key, module in modules.items():
        assert np.abs(module.scores.detach().numpy() - expected[f"scores/{key}"]).max() < 5e-3
    kept = dict(zip(expected["kept_names"].tolist(), expected["kept"].tolist(), strict=True))
    assert {key: int(m.mask.sum()) for key, m in modules.items()} == kept
    final = model.eval()(**batch(0)[0]).detach().numpy()
    assert np.abs(final - expected["final_logits"]).max() < 1e-3
    for key, tensor in model.state_dict().items():  # all but the scores are equal bit for bit
        assert key.endswith(".scores") or torch.equal(tensor, before[key])


# name: (first value, last value, first step of the ramp, last step of the ramp), of 1000 steps
SCHEDULES = {"mvp": (1.0, 0.1, 100, 800), "smvp": (0.0, 0.1, 100, 800), "smp": (1.0, 0.03, 0, 600)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    """`cubic_at` gives the values of the release's schedules at every step.

    They are the density of hard movement pruning (mvp), tau and lambda of soft movement pruning
    (smvp), and the density of the movement code when it runs with SMP's settings (smp).
    """
    first, last, start, end = SCHEDULES[name]
    for step, value in enumerate(golden("schedules")[f"{name}/value"]):
        assert abs(cubic_at(step, first, last, start, end) - value) < 1e-6
        if name == "smvp":  # lambda follows tau
            assert (
                abs(
                    400 * cubic_at(step, *SCHEDULES[name]) / 0.1
                    - golden("schedules")["smvp/lambda"][step]
                )
                < 1e-6
            )


@pytest.mark.parametrize("name", ["l1", "l0"])
def test_regulariser(name):
    """The penalty R on the scores has the release's value, for SMP (l1) and for L0 (l0)."""
    expected = golden("regularizers")
    linear = MaskedLinear(torch.nn.Linear(16, 24))
    with torch.no_grad():
        linear.scores.copy_(torch.from_numpy(expected["scores"]))
    linear.scores.grad = torch.zeros_like(linear.scores)
    shift = {"l1": 0.0, "l0": METHODS["l0"].shift}[name]
    with torch.no_grad():
        assert abs(float(add_penalty([linear], 1.0, shift)) - expected[name]) < 1e-6


# recorded case: our method; the number in the name is the density or, with a threshold, tau
MASKS = {
    "topK_0.25": "movement",
    "topK_0.03": "movement",
    "magnitude_0.25": "magnitude",
    "l0_1.0": "l0",
}
MASKS |= {
    "sigmoied_threshold_0.6": "soft-movement",
    "sigmoied_threshold_0.99": "soft-movement",  # here the rule acts that at least 0.5% stay
}


@pytest.mark.parametrize("key", MASKS)
def test_masked_linear(key):
    """A method's update gives one 16 -> 24 layer the release's mask, output and gradients."""
    expected, threshold = golden("masked_linear"), float(key.rpartition("_")[2])
    config = BertConfig(
        vocab_size=9,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=24,
    )
    settings = {
        "hold": 0.0,
        "ramp": 0.5,
        "density": threshold,
        "lr": 0.0,
        "score_lr": 0.0,
        "seed": 0,
    }
    settings |= {"pattern": "weight"}
    method = METHODS[MASKS[key]](Bert(config, "classifier", 2), SimpleNamespace(**settings), 10)
    method.threshold = threshold  # tau
    (layer,) = method.masked["U"]
    with torch.no_grad():
        for name in ("weight", "bias", "scores"):
            if getattr(layer, name) is not None:
                getattr(layer, name).copy_(torch.from_numpy(expected[name]))
    method.update(10)
    x = torch.from_numpy(expected["x"]).requires_grad_()
    y = layer.eval()(x)
    y.backward(torch.from_numpy(expected["grad_out"]))
    mask = layer.gate() if isinstance(layer, HardConcreteLinear) else layer.mask
    values = {"mask": mask, "y": y, "grad_x": x.grad, "grad_weight": layer.weight.grad}
    if layer.scores is not None:
        values["grad_scores"] = layer.scores.grad
    for name, value in values.items():
        assert np.abs(value.detach().numpy() - expected[f"{key}/{name}"]).max() < 1e-6, name
    assert {f"{key}/{name}" for name in values} == {
        name for name in expected if name.startswith(key)
    }


@pytest.mark.parametrize("name, window, beta2", [("nobias", 10, 0.99), ("every_step", 1, 0.85)])
def test_pins_run(name, window, beta2):
    """120 steps of PINS under plain SGD agree with the release.

    At every step the count of kept weights and the importance at the cut are the release's. At the
    end the weights and both moving averages (`ema`, `unc`) are the release's.
    """
    expected, steps = golden(f"pins_release_{name}"), 120
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=16,
    )
    settings = {"hold": 10 / 120, "ramp": 80 / 120, "density": 0.2, "beta1": 0.85, "beta2": beta2}
    model = Bert(config, "classifier", 2)
    method = METHODS["pins"](
        model, SimpleNamespace(**settings, pins_window=window, pins_score="absolute"), steps
    )
    weights = {f"encoder.layer.{i}.{m}.weight": None for i in range(2) for m in MATRICES.values()}
    weights = {key: model.bert.get_parameter(key) for key in weights}
    cuts = []
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(torch.from_numpy(expected[f"init/{key}"]))
        for step in range(steps):
            for key, weight in weights.items():
                weight.grad = torch.from_numpy(expected[f"grad/{key}"][step])
            lr = expected["lr"][step]
            method.observe(step, lr)
            cut = np.nan if method.mask is None else float(method.importance()[method.mask].min())
            cuts.append(cut)
            for weight in weights.values():
                weight -= lr * weight.grad
            method.update(step + 1)
            assert method.density(step) == pytest.approx(expected["density"][step], abs=1e-12)
            assert round(method.achieved() * sum(method.sizes)) == expected["kept"][step], step
    assert np.allclose(cuts, expected["cut"], rtol=1e-5, atol=0, equal_nan=True)
    order = {id(weight): i for i, weight in enumerate(method.weights)}
    for key, weight in weights.items():
        place = order[id(weight)]
        assert np.abs(weight.detach().numpy() - expected[f"final/{key}"]).max() < 1e-6
        for ours, theirs in (("ema", "ema"), ("unc", "unc")):
            value = getattr(method, ours).split(method.sizes)[place].view_as(weight).numpy()
            assert np.allclose(value, expected[f"{theirs}/{key}"], rtol=1e-5, atol=0), (ours, key)


@pytest.mark.parametrize("classes", [2, 3])
def test_self_regularisation(classes):
    """PINS's loss with a teacher is the release's, for each example and as the mean."""
    expected = golden("pins_self_regularization")
    read = {
        name: torch.from_numpy(expected[f"{classes}/{name}"])
        for name in ("student", "teacher", "labels")
    }
    ce = KIND.losses(read["student"], read["labels"])
    losses = self_distill(ce, read["student"], read["teacher"])
    alpha, distilled = expected[f"{classes}/alpha"], expected[f"{classes}/distill"]
    assert np.abs(ce.numpy() - expected[f"{classes}/ce"]).max() < 1e-6
    assert (
        np.abs(losses.numpy() - (alpha * distilled + (1 - alpha) * expected[f"{classes}/ce"])).max()
        < 1e-6
    )
    assert abs(float(losses.mean()) - expected[f"{classes}/loss"]) < 1e-6


def test_glue_metrics():
    """Each metric of classes and of scores has the value that the GLUE metric code gave."""
    metrics = Classify.metrics | Score.metrics
    expected = golden("glue_metrics")
    for key in expected.files:
        group, name = key.split("/")
        if name in metrics:
            ours = metrics[name](expected[f"{group}/preds"], expected[f"{group}/labels"])
            assert abs(ours - expected[key]) < 1e-9, key
