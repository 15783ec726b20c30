"""Properties of a run: its folder and result, its reproducibility, its teachers and its recipes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import eval as evaluation
import prune
import train
from data import batches, load_dataset, load_dev
from kinds import classify
from models.checkpoint import baked_state, load_model, read_checkpoint, save_model
from models.runs import load_run
from models.teacher import distill
from models.tokenizer import load_tokenizer, word_ids
from support.machine import inputs, pick_dtype
from support.recipes import recipe
from support.schedules import lr_at
from support.terminal import show
from tools import pictures, report

ROOT = Path(train.__file__).parent
CPU = torch.device("cpu")
RESULT = [
    "task",
    "model",
    "method",
    "density",
    "achieved_density",
    "metrics",
    "best",
    "seed",
    "steps",
    "epochs",
    "train_seconds",
    "examples_per_second",
    "peak_memory_bytes",
    "command",
]


def flags_of(**options):
    """Command-line flags: max_steps=2 becomes ["--max-steps", "2"]."""
    flags = []
    for name, value in options.items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    return flags


def run(flags, out, **options):
    """Run train.py in this process with `flags` and `options`, and return its result."""
    assert train.main([*flags, "--out", str(out), *flags_of(**options)]) == 0
    return result_of(out)


def result_of(out):
    """The result of a finished run, from its result.json."""
    return json.loads((out / "result.json").read_text())


def rows(out):
    """The rows of a run's log, metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out):
    """The logged losses of a run, in order."""
    return [row["loss"] for row in rows(out) if "loss" in row]


def steps_with(out, key):
    """The steps of those rows of a run's log that have `key`."""
    return [row["step"] for row in rows(out) if key in row]


def dataset_of(out, split="train"):
    """The data set of a run, as the run read it, and the settings of the run."""
    _, task, tokenizer, settings = load_run(out)
    data = load_dataset(task, split, tokenizer, settings["max_length"], settings["data_dir"])
    return data, settings


def trained(out):
    """What two equal runs share bit for bit: all tensors, and the log without its timings."""
    tensors = {}
    for path in sorted(out.rglob("*.safetensors")):
        tensors[str(path.relative_to(out))] = load_file(path)
    log = rows(out)
    for row in log:
        row.pop("examples_per_second", None)
    return tensors, log


def same(a, b):
    """Assert that two run folders hold the same run, bit for bit."""
    tensors_a, log_a = trained(a)
    tensors_b, log_b = trained(b)
    assert log_a == log_b
    assert tensors_a.keys() == tensors_b.keys()
    assert len(tensors_a) >= 3
    for path in tensors_a:
        assert tensors_a[path].keys() == tensors_b[path].keys()
        for name in tensors_a[path]:
            assert torch.equal(tensors_a[path][name], tensors_b[path][name]), (path, name)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A folder with one finished run of each method, named like the method."""
    folder = tmp_path_factory.mktemp("finished")
    for method in prune.CRITERIA:
        run(tiny, folder / method, method=method, lr=1e-3)
    return folder


def test_run_folder(finished):
    """A run leaves a result, its settings, a log of every step, and a model of the density said."""
    for method in prune.CRITERIA:
        out = finished / method
        result = result_of(out)
        assert list(result) == RESULT
        assert result["steps"] == 26  # 2 epochs of ceil(203 / 16) steps
        assert result["epochs"] == 2
        assert result["task"] == "pairs"
        assert set(result["metrics"]) == {"accuracy", "f1"}
        assert set(result["best"]) == {"metrics", "step"}
        config = json.loads((out / "config.json").read_text())
        assert config["settings"]["method"] == method
        assert config["settings"]["max_steps"] == 26
        assert config["versions"]["torch"] == torch.__version__
        assert steps_with(out, "loss") == list(range(1, 27))
        assert steps_with(out, "metrics") == [13, 26]
        assert rows(out)[-1]["metrics"] == result["metrics"]
        model = load_run(out)[0]
        kept, total = evaluation.kept_weights(model)
        assert kept.sum() == round(result["achieved_density"] * total.sum())


def test_the_density_of_smp_falls_to_the_one_asked_for(finished):
    """SMP-S starts near density 1 and ends at 0.1, less at most one weight for each matrix."""
    out = finished / "smp-s"
    tensors = load_file(out / "scores.safetensors")
    weights = sum(tensor.numel() for name, tensor in tensors.items() if "mask" in name)
    assert abs(result_of(out)["achieved_density"] - 0.1) < 18 / weights
    assert rows(out)[0]["density"] > 0.8


def test_pretrained_weights_do_not_move(tiny, finished):
    """Each weight that SMP saves is the pretrained one, bit for bit, or 0.0 where it is masked.

    The pooler is not saved, because SMP does not use it.
    """
    before = read_checkpoint(tiny[1])
    after = read_checkpoint(finished / "smp-s" / "model")
    scores = load_file(finished / "smp-s" / "scores.safetensors")
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert before.keys() - after.keys() == pooler
    masked = 0
    for name, tensor in after.items():
        expected = before[name]
        mask = scores.get(name.removesuffix("weight") + "mask")
        if mask is not None:
            expected = expected * mask
            masked += 1
        assert torch.equal(tensor, expected)
    assert masked == 18


def test_bf16_computes_and_fp32_remembers(tiny, tmp_path):
    """With bf16 the losses are within 2% of those with fp32, but not equal to them.

    What is saved is float32 all the same.
    """
    for dtype in ("bf16", "fp32"):
        run(tiny, tmp_path / dtype, method="dense", lr=1e-3, max_steps=5, dtype=dtype)
    half = losses_of(tmp_path / "bf16")
    full = losses_of(tmp_path / "fp32")
    assert len(half) == len(full) == 5
    assert half[0] != full[0]
    for a, b in zip(half, full, strict=True):
        assert abs(a / b - 1) < 0.02
    for path in (tmp_path / "bf16").rglob("*.safetensors"):
        for tensor in load_file(path).values():
            assert tensor.dtype in (torch.float32, torch.bool)


def test_the_data_type_follows_the_device(monkeypatch):
    """A CPU computes in bf16 if it multiplies in it, else in fp32; Apple's MPS computes in fp32.

    Older versions of torch cannot tell what a CPU can do.
    """
    for able, expected in (
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert pick_dtype(CPU) == expected
        assert pick_dtype(torch.device("mps")) == "fp32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert pick_dtype(CPU) == "fp32"


@pytest.mark.parametrize("method", ["smp-s", "movement", "magnitude"])
def test_sweep_of_densities(tiny, finished, method, capsys):
    """A finished run can be evaluated at other densities, which are then exactly met.

    At the density of training the result is the run's. At density 1 SMP is the pretrained model.
    A run whose method keeps no scores is refused, and so is a density that is no number.
    """
    data = ["--data-dir", tiny[5]]
    out = finished / method
    assert report.main([str(out), "--density", "1", "0.1", "0.5", *data]) == 0
    whole, trained_at, half = capsys.readouterr().out.strip().split("\n")
    result = result_of(out)
    achieved, metrics = result["achieved_density"], show(result["metrics"])
    assert trained_at == f"density 0.1, achieved {achieved:.4f}: {metrics}"
    assert whole.startswith("density 1, achieved 1.0000: ")
    assert 0.499 < float(half.removeprefix("density 0.5, achieved ").split(":")[0]) <= 0.5
    if method == "smp-s":
        task = load_run(out)[1]
        tokenizer = load_tokenizer(tiny[1], 120)
        model = load_model(tiny[1], "words", words=word_ids(tokenizer, task.words))
        dev = load_dev(task, tokenizer, 24, tiny[5])
        metrics = evaluation.evaluate(model, dev, CPU, "fp32")
        assert whole.endswith(show(metrics))

    assert report.main([str(finished / "pins"), "--density", "0.5", *data]) == 2
    assert report.main([str(out), "--density", "nan", *data]) == 2
    said = capsys.readouterr().err
    assert "cannot be ranked again" in said
    assert "(0, 1]" in said


def test_densities_of_matrices_and_heads(finished):
    """The densities of each matrix and each attention head are those counted by hand.

    Here the rows of one head in the Q, K and V of one layer are set to zero.
    """
    model = load_run(finished / "dense")[0]
    attention = model.layers[1].attention["self"]
    width = len(attention.query.weight)
    size = width // model.config.num_attention_heads
    with torch.no_grad():
        for linear in (attention.query, attention.key, attention.value):
            linear.weight[:size] = 0
    kept, total = evaluation.kept_weights(model)
    assert kept.sum() == total.sum() - 3 * size * width
    assert (kept / total)[1, 0] == 1 - size / width
    per_head = pictures.head_densities(model)
    assert per_head[1, 0] == 0.25  # of its Q, K, V and O only O is left
    assert per_head.sum() == per_head.size - 0.75


def test_plot(finished, tmp_path, capsys, monkeypatch):
    """--plot writes a PNG; without matplotlib one sentence says what to install."""
    path = tmp_path / "run.png"
    argv = [str(finished / "smp-s"), "--plot", str(path)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert report.main(argv) == 2
        assert "pip install matplotlib" in capsys.readouterr().err
        assert not path.exists()
    pytest.importorskip("matplotlib")
    assert report.main(argv) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_run(tiny, finished, tmp_path):
    """Two runs with one seed are equal bit for bit; a run with another seed is not."""
    run(tiny, tmp_path / "again", method="smp-s", lr=1e-3)
    same(tmp_path / "again", finished / "smp-s")
    options = {"method": "smp-s", "max_steps": 2, "dropout": 0}
    for seed in (0, 1):
        run(tiny, tmp_path / f"seed-{seed}", **options, seed=seed)
    a, b = [load_file(tmp_path / f"seed-{seed}" / "scores.safetensors") for seed in (0, 1)]
    assert any(not torch.equal(a[name], b[name]) for name in a)


def resume_after_a_crash(flags, out):
    """Resume the run in `out`, where a crash left a torn last line and a temporary file, too."""
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 1')
    stray = out / ".checkpoint.safetensors.1.tmp"
    shutil.copy(out / "checkpoint.safetensors", stray)
    assert train.main([*flags, "--resume"]) == 0
    stray.unlink()


def test_killed_and_resumed_is_uninterrupted(tiny, finished, tmp_path):
    """A run that is killed (kill -9) after a checkpoint and resumed ends as an unbroken run does.

    This holds bit for bit. A torn last line of the log and a temporary file that the kill left
    behind do no harm.
    """
    out = tmp_path / "run"
    flags = [*tiny, "--method", "smp-s", "--lr", "1e-3", "--out", str(out)]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while not (out / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.03))  # the other half of the run takes longer
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resume_after_a_crash(flags, out)
    same(out, finished / "smp-s")


class Crash(Exception):
    """What no part of the program expects."""


@pytest.mark.parametrize("method, last", [("dense", 14), ("l0", 20), ("pins", 26)])
def test_crashed_and_resumed_is_uninterrupted(tiny, finished, tmp_path, monkeypatch, method, last):
    """A run that crashes after step `last` goes on from its checkpoint of step 13.

    It ends as an unbroken run does, bit for bit.
    """

    def crash(self, step):
        update(self, step)
        if step == last:
            raise Crash

    out = tmp_path / "run"
    flags = [*tiny, "--method", method, "--lr", "1e-3", "--out", str(out)]
    update = prune.METHODS[method].update
    with monkeypatch.context() as patch:
        patch.setattr(prune.METHODS[method], "update", crash)
        with pytest.raises(Crash):
            train.main(flags)
    assert rows(out)[-1]["step"] == last - 1
    resume_after_a_crash(flags, out)
    same(out, finished / method)


def interrupted_at(last, update):
    """A method's `update` that raises SIGTERM in this process after step `last`."""

    def interrupt(self, step):
        update(self, step)
        if step == last:
            signal.raise_signal(signal.SIGTERM)

    return interrupt


def test_terminated_run_saves_first(tiny, finished, tmp_path, monkeypatch):
    """On SIGTERM a run finishes its step, writes a checkpoint and ends with status 143.

    `--out RUN --resume` continues it to the end. Given again, it leaves the finished run as it is.
    After the run the process listens to signals as it did before.
    """
    out = tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(prune.SMPShared, "update", interrupted_at(7, prune.SMPShared.update))
        assert train.main([*tiny, "--lr", "1e-3", "--out", str(out)]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert rows(out)[-1]["step"] == 7
    assert not (out / "result.json").exists()
    for _ in range(2):
        assert train.main(["--out", str(out), "--resume"]) == 0
        same(out, finished / "smp-s")


def test_micro_batches_change_nothing(tiny, tmp_path):
    """Each loss is the same when a batch is computed in three pieces, also for a short batch."""
    options = {"dropout": 0, "method": "dense", "max_steps": 14}
    run(tiny, tmp_path / "whole", **options)
    run(tiny, tmp_path / "pieces", **options, grad_accum=3)
    whole = np.array(losses_of(tmp_path / "whole"))
    pieces = np.array(losses_of(tmp_path / "pieces"))
    assert np.abs(whole - pieces).max() < 1e-5


def test_teacher(tiny, finished, tmp_path, capsys):
    """The first loss is the distillation loss with the saved teacher's logits.

    The teacher's metrics are printed before it teaches.
    """
    out = tmp_path / "student"
    dense = finished / "dense"
    run(tiny, out, method="smp-s", teacher=dense, dropout=0, max_steps=1)
    assert f"teacher {dense}: accuracy" in capsys.readouterr().out.split("dev:")[0]

    teacher, task, tokenizer, _ = load_run(dense)
    data, settings = dataset_of(dense)
    places = batches(data.lengths, settings["batch_size"], settings["seed"], 0)[0]
    batch = data.collate(places)
    student = load_model(tiny[1], "words", words=word_ids(tokenizer, task.words))
    tensors = inputs(batch, CPU)
    with torch.no_grad():
        logits = student.eval()(**tensors)
        taught = teacher.eval()(**tensors)
    ce = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    loss = distill(ce, logits, taught)
    assert losses_of(out)[0] == pytest.approx(float(loss.mean()), abs=1e-5)


def test_every_method_takes_a_teacher(tiny, finished, tmp_path):
    """Methods of each family keep the teacher's logits for all 203 examples in their checkpoint."""
    dense = finished / "dense"
    for method, options in {"movement": {}, "l0": {}, "pins": {"pins_window": 1}}.items():
        out = tmp_path / method
        run(tiny, out, method=method, teacher=dense, max_steps=4, **options)
        taught = taught_table(out)
        assert taught.shape == (203, 2)
        assert torch.equal(taught, taught_by(dense / "model", finished))


def taught_table(out):
    """The table of the teacher of a run: its only file, which its checkpoint names."""
    (path,) = out.glob("teacher-*.safetensors")
    with safe_open(out / "checkpoint.safetensors", framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
    assert progress["teacher_file"] == path.name
    return load_file(path)["teacher"]


def taught_by(folder, finished):
    """The logits (N, K) of the classifier in `folder` on the training set, computed anew."""
    data, _ = dataset_of(finished / "dense")
    model = load_model(folder, "classifier", 2, new_head=False)
    return data.kind.logits(model, data, CPU, "fp32")


def test_self_teacher_is_its_best_checkpoint(tiny, finished, tmp_path, monkeypatch):
    """A run that teaches itself takes a new teacher at each better evaluation, and at no other.

    The teacher's table holds the logits of that checkpoint: bit for bit when they are computed in
    the same batches, to 1e-5 in others. After an interruption and a resume the tables are the same,
    and none is computed twice. Until the first teacher, the run is one without a teacher.
    """
    tables = []
    teach = classify.Classify.teach

    def noted(self, model, *rest):
        """Compute a table as train.py does, but save the model and keep the table."""
        folder = tmp_path / f"teacher-{len(tables)}"
        save_model(folder, model, baked_state(model), ("no", "yes"))
        tables.append(teach(self, model, *rest))
        return tables[-1]

    options = {"method": "pins", "lr": 3e-4, "seed": 1, "eval_every": 1, "dropout": 0}
    options |= {"max_steps": 12}
    out = tmp_path / "run"
    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(classify.Classify, "teach", noted)
        run(tiny, out, **options)
        assert 4 <= len(tables) < 11  # in several of the 11 steps before the last, not in all
        best = -1.0
        better = []  # the steps after which the student is better than ever, but for the last step
        for row in rows(out):
            if "metrics" in row and row["metrics"]["accuracy"] > best and row["step"] < 12:
                best = row["metrics"]["accuracy"]
                better.append(row["step"])
        assert steps_with(out, "teacher") == better
        assert len(tables) == len(better)
        for i, table in enumerate(tables):
            folder = tmp_path / f"teacher-{i}"
            assert torch.equal(table, taught_by(folder, finished))
        with monkeypatch.context() as inner:
            inner.setitem(classify.MAX_TOKENS, "cpu", 150)
            assert (table - taught_by(folder, finished)).abs().max() < 1e-5
        assert torch.equal(taught_table(out), tables[-1])

        computed = len(tables)
        with monkeypatch.context() as inner:
            inner.setattr(prune.Pins, "update", interrupted_at(6, prune.Pins.update))
            argv = [*tiny, *flags_of(**options), "--out", str(again)]
            assert train.main(argv) == 128 + signal.SIGTERM
        assert len(tables) > computed  # some teachers came before the interruption
        assert train.main([*argv, "--resume"]) == 0
        assert len(tables) == 2 * computed
    same(out, again)

    run(tiny, tmp_path / "none", **options, teacher="none")
    taught = losses_of(out)
    untaught = losses_of(tmp_path / "none")
    first = better[0]
    assert taught[:first] == untaught[:first]
    assert taught[first] != untaught[first]


def test_self_teacher_of_a_regression(tiny, tmp_path):
    """In a regression half of the loss is the error to the label, half that to the teacher's value.

    At the step after the student became its own teacher, the second half is 0.
    """
    source = Path(tiny[3]).parent
    for split in ("train", "dev"):
        text = (source / f"{split}.tsv").read_text()
        text = text.replace("\tyes\n", "\t4.5\n")
        text = text.replace("\tno\n", "\t1.5\n")
        (tmp_path / f"{split}.tsv").write_text(text)
    task = json.loads(Path(tiny[3]).read_text())
    del task["labels"]
    task |= {"range": [0, 5], "metric": ["pearson", "spearman"]}
    (tmp_path / "task.json").write_text(json.dumps(task))
    flags = [*tiny[:3], str(tmp_path / "task.json"), *tiny[4:]]
    out = tmp_path / "out"
    run(flags, out, method="pins", dropout=0, max_steps=3, eval_every=2, pins_window=1)

    table = taught_table(out)
    assert table.shape == (203,)
    assert steps_with(out, "teacher") == [2]
    data, settings = dataset_of(out)
    third = batches(data.lengths, settings["batch_size"], settings["seed"], 0)[2]
    error = (table[third] - torch.from_numpy(data.labels[third])) ** 2
    assert losses_of(out)[2] == pytest.approx(0.5 * float(error.mean()), rel=1e-4)


def texts_of(data):
    """The token ids of each example of a data set, as tuples."""
    return [tuple(data.ids[data.tokens(i)]) for i in range(len(data))]


def test_self_teacher_from_a_dense_run_on_a_held_out_part(tiny, finished, tmp_path):
    """With `self:RUN` the run's logits teach until the student is better than the run.

    With --teacher-split that is judged on a part of the training set, which is not trained on.
    """
    out = tmp_path / "out"
    dense = finished / "dense"
    run(tiny, out, method="pins", teacher=f"self:{dense}", teacher_split=0.2, lr=1e-7)
    assert steps_with(out, "teacher") == []  # with so small an lr the student gets no better
    data, _ = dataset_of(dense)
    rest, held = data.split(0.2, 0)
    table = taught_table(out)
    assert (len(table), len(rest), len(held)) == (162, 162, 41)
    texts = texts_of(data)
    assert sorted(texts) == sorted(texts_of(rest) + texts_of(held))
    where = [texts.index(text) for text in texts_of(rest)]
    everything = taught_by(dense / "model", finished)
    assert (table - everything[where]).abs().max() < 1e-5
    assert np.array_equal(data.labels[where], rest.labels)
    assert np.array_equal(data.second[where], rest.second)


def test_learning_rate():
    """The factor rises linearly from 0 to 1 during the warm-up, then falls linearly towards 0."""
    factors = [lr_at(t, 100, 0.1) for t in range(100)]
    assert factors[0] == 0
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == 1 / 90
    assert [lr_at(t, 40, 0.0) for t in range(40)] == [(40 - t) / 40 for t in range(40)]


def settings_of(**given):
    """The settings that train.py has with these flags and its recipe for all others."""
    return train.settings_from({"model": str(ROOT / "tests/golden/tiny-bert")} | given)


def test_the_recipe_of_smp_is_the_published_one():
    """The defaults of SMP are those of its released run scripts, by task and density."""
    s = settings_of(task="mnli", method="smp-s", density=0.1)
    assert (s.epochs, s.batch_size, s.max_length) == (12, 64, 128)
    assert (s.score_lr, s.reg_lambda) == (2e-2, 400.0)
    steps = 73_632  # MNLI has 12 epochs of 6,136 steps
    for density, falling in ((0.1, 43_632), (0.7, 5_250), (0.8, 3_500)):
        ramp = settings_of(task="mnli", density=density).ramp
        assert abs(ramp * steps - falling) < 50
    assert settings_of(task="rte").epochs == 100
    assert settings_of(task="mrpc").epochs == 60
    assert settings_of(task="mrpc").batch_size == 32
    for density, temperature in ((0.03, 1), (0.5, 1), (0.7, 4), (0.8, 4)):
        assert settings_of(task="qqp", density=density).temperature_s == temperature
    assert settings_of(task="mnli", density=0.5).temperature_s == 3
    assert settings_of(task="mnli", density=0.5, teacher="x").temperature_s == 1


def test_flags_and_methods_change_the_recipe():
    """A dense run keeps every weight. A flag goes before the recipe."""
    assert settings_of(task="cola", method="dense").density == 1
    assert settings_of(task="cola", score_lr=0.5).score_lr == 0.5
    for density in (0.1, 0.7):  # texts have a ramp of their own, at every density
        assert recipe("smp", "generate", "e2e", "gpt2", density, False)["ramp"] == 0.6


def test_the_recipe_of_movement_pruning_is_the_published_one():
    """The defaults of movement pruning and L0 are the published ones for SQuAD, 55,400 steps."""
    s = settings_of(task="mnli", method="movement")
    steps = 55_400
    assert (s.epochs, s.batch_size, s.lr, s.score_lr) == (10, 16, 3e-5, 1e-2)
    assert abs(s.warmup * steps - 5_400) < 5
    assert s.hold == s.warmup
    assert abs((1 - s.hold - s.ramp) * steps - 10_800) < 10
    soft = settings_of(task="mnli", method="soft-movement")
    assert (soft.density, soft.reg_lambda) == (None, 400.0)
    l0 = settings_of(task="mnli", method="l0")
    assert (l0.density, l0.reg_lambda, l0.score_lr) == (None, 125.0, 0.1)


def test_the_recipe_of_pins_is_the_published_one():
    """The defaults of PINS are the published ones for RTE."""
    s = settings_of(task="rte", method="pins")
    steps = 20 * 156
    assert (s.epochs, s.batch_size, s.lr, s.density, s.teacher) == (20, 16, 3e-5, 0.2, "self")
    assert (s.beta1, s.beta2, s.pins_window) == (0.85, 0.99, 10)
    assert abs(s.warmup * steps - 200) < 1
    assert s.hold == s.warmup
    assert abs((1 - s.hold - s.ramp) * steps - 1_200) < 2


def test_evaluation_agrees_with_the_run(finished, capsys):
    """The saved model, which has no masks, has the metrics that the run measured in training.

    eval.py prints them.
    """
    for method in prune.CRITERIA:
        out = finished / method
        metrics = result_of(out)["metrics"]
        model, task, tokenizer, settings = load_run(out)
        data_dir = settings["data_dir"]
        dev = load_dev(task, tokenizer, settings["max_length"], data_dir)
        assert evaluation.evaluate(model, dev, CPU, "fp32") == metrics
        if method in ("dense", "smp-s"):
            assert evaluation.main([str(out), "--data-dir", data_dir]) == 0
            printed = capsys.readouterr().out
            assert f"accuracy          {100 * metrics['accuracy']:.2f}" in printed


def test_predictions_file(finished, tmp_path):
    """The predictions file has index<TAB>prediction in the file's order, in the task's words.

    The batches, which have another order, do not change this.
    """
    path = tmp_path / "pairs.tsv"
    dense = finished / "dense"
    settings = json.loads((dense / "config.json").read_text())["settings"]
    flags = ["--predictions", str(path), "--split", "dev", "--data-dir", settings["data_dir"]]
    assert evaluation.main([str(dense), *flags]) == 0
    header, *lines = path.read_text().splitlines()
    assert header == "index\tprediction"
    indices = [line.split("\t")[0] for line in lines]
    assert indices == [str(i) for i in range(60)]
    predictions = [line.split("\t")[1] for line in lines]
    source = Path(settings["task_file"]).parent / "dev.tsv"
    labels = [line.split("\t")[2] for line in source.read_text().splitlines()[1:]]
    right = [said == label for said, label in zip(predictions, labels, strict=True)]
    assert np.mean(right) == result_of(dense)["metrics"]["accuracy"]


def test_table_groups_seeds_and_nothing_else(tiny, finished, tmp_path, capsys):
    """Runs that differ in their seed only make one row of the table, with mean and deviation.

    Another method or pattern makes another row. A run of an older version, whose config has no
    `pattern`, is grouped with those of the default pattern.
    """
    for seed in (0, 1):
        run(tiny, tmp_path / f"s{seed}", method="smp-l", max_steps=13, seed=seed)
    run(tiny, tmp_path / "unit", method="smp-l", max_steps=13, pattern="unit")
    older = json.loads((tmp_path / "s1" / "config.json").read_text())
    del older["settings"]["pattern"]
    (tmp_path / "s1" / "config.json").write_text(json.dumps(older))
    capsys.readouterr()
    runs = [tmp_path / name for name in ("s0", "s1", "unit")]
    runs += [finished / method for method in ("smp-s", "dense")]
    assert report.main([str(out) for out in runs]) == 0
    cells = []
    for line in capsys.readouterr().out.splitlines()[2:]:
        cells.append([cell.strip() for cell in line.split("|")[1:-1]])
    assert [row[1] for row in cells] == ["dense", "smp-l", "smp-l (unit)", "smp-s"]
    assert [row[4] for row in cells] == ["1", "2", "1", "1"]
    values = [100 * result_of(out)["metrics"]["accuracy"] for out in runs[:2]]
    expected = f"accuracy {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert cells[1][6].startswith(expected)
