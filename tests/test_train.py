"""Properties of a run: reproducible, resumable, the same on two processes; its folder and its result."""

import hashlib
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
from safetensors.torch import load_file

import eval as evaluation
import prune
import train
from data import batches, collate, load_dataset, word_ids
from model import load_model, read_checkpoint
from train import lr_at

ROOT = Path(train.__file__).parent
RESULT = "task model method density achieved_density metrics best seed steps epochs train_seconds examples_per_second"
RESULT = [*RESULT.split(), "peak_memory_bytes", "command"]


def run(flags, out, *more):
    """train.main in this process; the parsed result.json."""
    assert train.main([*flags, "--out", str(out), *map(str, more)]) == 0
    return json.loads((out / "result.json").read_text())


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def trained(out):
    """What two runs must share, bit for bit: tensors, and the rows of the log without their timings."""
    files = sorted(out.rglob("*.safetensors"))
    tensors = {str(f.relative_to(out)): load_file(f) for f in files}
    log = [{k: v for k, v in row.items() if k != "examples_per_second"} for row in rows(out)]
    return tensors, log


def same(a, b):
    (ta, la), (tb, lb) = trained(a), trained(b)
    assert la == lb and ta.keys() == tb.keys() and len(ta) >= 3
    for name in ta:
        assert ta[name].keys() == tb[name].keys()
        for key in ta[name]:
            assert torch.equal(ta[name][key], tb[name][key]), (name, key)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    for method in prune.METHODS:
        run(tiny, folder / method, "--method", method, "--lr", 1e-3)
    return folder


def test_run_folder(tiny, finished):
    for method in prune.METHODS:
        out = finished / method
        result = json.loads((out / "result.json").read_text())
        assert list(result) == RESULT
        assert result["steps"] == 26 and result["epochs"] == 2 and result["task"] == "pairs"  # ceil(203 / 16) * 2
        assert set(result["metrics"]) == {"accuracy", "f1"}
        assert set(result["best"]) == {"metrics", "step"}
        config = json.loads((out / "config.json").read_text())
        assert config["settings"]["method"] == method and config["settings"]["epochs"] == 2
        assert config["versions"]["torch"] == torch.__version__
        log = rows(out)
        assert [row["step"] for row in log if "loss" in row] == list(range(1, 27))
        assert [row["step"] for row in log if "metrics" in row] == [13, 26]
        assert log[-1]["metrics"] == result["metrics"]
        kept, sizes = evaluation.kept_weights(evaluation.load_run(out)[0])
        assert kept.sum() == round(result["achieved_density"] * sizes.sum())  # counted in the file
    out = finished / "smp-s"
    n = sum(x.numel() for name, x in load_file(out / "scores.safetensors").items() if "mask" in name)
    assert abs(json.loads((out / "result.json").read_text())["achieved_density"] - 0.1) < 18 / n
    assert rows(out)[0]["density"] > 0.8


def test_pretrained_weights_do_not_move(tiny, finished):
    """Every saved weight of an SMP run is the pretrained one, bit for bit, or a masked exact zero."""
    before, after = read_checkpoint(tiny[1]), read_checkpoint(finished / "smp-s" / "model")
    scores = load_file(finished / "smp-s" / "scores.safetensors")
    assert before.keys() - after.keys() == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}  # not read, not kept
    masked = 0
    for name, tensor in after.items():
        mask = scores.get(name.removesuffix("weight") + "mask")
        masked += mask is not None
        assert torch.equal(tensor, before[name] if mask is None else before[name] * mask)
    assert masked == 18


def test_bf16_computes_and_fp32_remembers(tiny, finished, tmp_path):
    """Under autocast the losses are those of fp32 to 2%, not to the bit; scores and weights stay float32."""
    run(tiny, tmp_path / "run", "--method", "smp-s", "--lr", 1e-3, "--dtype", "bf16")
    logs = zip(rows(tmp_path / "run"), rows(finished / "smp-s"), strict=True)
    pairs = [(a["loss"], b["loss"]) for a, b in logs if "loss" in a]
    assert pairs[0][0] != pairs[0][1] and all(abs(a / b - 1) < 0.02 for a, b in pairs[:5])
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert all(t.dtype in (torch.float32, torch.bool) for t in load_file(path).values())
    assert train.pick_dtype(torch.device("cpu")) in ("bf16", "fp32") and train.pick_dtype(torch.device("mps")) == "fp32"


@pytest.mark.parametrize("method", ["smp-s", "movement", "magnitude"])
def test_sweep_of_densities(tiny, finished, method, capsys):
    """At the density of training the sweep is the run; the counts are those asked for; at 1 SMP is the base model."""
    data = ["--data-dir", tiny[5]]
    assert evaluation.main([str(finished / method), "--density", "1", "0.1", "0.5", *data]) == 0
    whole, same, half = capsys.readouterr().out.strip().split("\n")
    result = json.loads((finished / method / "result.json").read_text())
    assert same == f"density 0.1, achieved {result['achieved_density']:.4f}: {evaluation.show(result['metrics'])}"
    assert whole.startswith("density 1, achieved 1.0000: ")
    assert 0.499 < float(half.removeprefix("density 0.5, achieved ").split(":")[0]) <= 0.5
    if method == "smp-s":
        task = evaluation.load_run(finished / method)[1]
        tokenizer = evaluation.load_tokenizer(tiny[1], 120)
        model = load_model(tiny[1], "words", words=word_ids(tokenizer, task.words))
        dev = evaluation.load_dev(task, tokenizer, 24, tiny[5])
        assert whole.endswith(evaluation.show(evaluation.evaluate(model, task, dev, torch.device("cpu"), "fp32")))
    assert evaluation.main([str(finished / "pins"), "--density", "0.5", *data]) == 2
    assert evaluation.main([str(finished / method), "--density", "nan", *data]) == 2
    assert "nothing to rank anew" in (said := capsys.readouterr().err) and "(0, 1]" in said


def test_plot(tiny, finished, tmp_path, capsys, monkeypatch):
    """Densities of a mask with one head and one row emptied; the picture, or one sentence that says what it needs."""
    model = evaluation.load_run(finished / "dense")[0]
    attention = model.bert.encoder["layer"][1].attention["self"]
    query, key, value = attention.query.weight, attention.key.weight, attention.value.weight
    size = len(query) // model.config.num_attention_heads
    with torch.no_grad():
        for weight in (query, key, value):
            weight[:size] = 0
    (kept, sizes), per_head = evaluation.kept_weights(model), evaluation.head_densities(model)
    assert kept.sum() == sizes.sum() - 3 * size * len(query) and (kept / sizes)[1, 0] == 1 - size / len(query)
    assert per_head[1, 0] == 0.25 and per_head.sum() == per_head.size - 0.75
    path = tmp_path / "run.png"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert evaluation.main([str(finished / "smp-s"), "--plot", str(path)]) == 2
        assert "pip install matplotlib" in capsys.readouterr().err and not path.exists()
    pytest.importorskip("matplotlib")
    assert evaluation.main([str(finished / "smp-s"), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_run(tiny, finished, tmp_path):
    run(tiny, tmp_path / "again", "--method", "smp-s", "--lr", 1e-3)
    same(tmp_path / "again", finished / "smp-s")
    run(tiny, tmp_path / "other", "--method", "smp-s", "--seed", 1)
    a, b = (load_file(f / "scores.safetensors") for f in (tmp_path / "other", finished / "smp-s"))
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["dense", "smp-s", "l0", "pins"])
def test_killed_and_resumed_is_uninterrupted(tiny, finished, tmp_path, method):
    """kill -9 at random moments, a torn log line, a stray temporary file: the same run in the end, bit for bit."""
    out = tmp_path / "run"
    flags = [*tiny, "--method", method, "--lr", "1e-3", "--out", str(out)]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--resume"]
    moments = random.Random(method)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while not (out / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(moments.uniform(0, 0.3))
    process.kill()
    process.wait()
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 1')
    shutil.copy(out / "checkpoint.safetensors", out / ".checkpoint.safetensors.1.tmp")
    assert train.main([*flags, "--resume"]) == 0
    (out / ".checkpoint.safetensors.1.tmp").unlink()
    same(out, finished / method)


def test_terminated_run_saves_first(tiny, finished, tmp_path, monkeypatch):
    """SIGTERM in step 7: the step is finished, a checkpoint written, status 143; --resume needs no other flag."""
    update = prune.SMPShared.update

    def interrupt(self, step):
        update(self, step)
        if step == 7:
            signal.raise_signal(signal.SIGTERM)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(prune.SMPShared, "update", interrupt)
        assert train.main([*tiny, "--lr", "1e-3", "--out", str(out)]) == 128 + signal.SIGTERM
    assert rows(out)[-1]["step"] == 7 and not (out / "result.json").exists()
    assert train.main(["--out", str(out), "--resume"]) == 0
    same(out, finished / "smp-s")
    assert train.main(["--out", str(out), "--resume"]) == 0  # of a finished run: the same result again
    same(out, finished / "smp-s")


def test_micro_batches_change_nothing(tiny, tmp_path):
    """The gradient of a batch in three pieces is the batch's, short last batch included."""
    flags = ("--dropout", 0, "--method", "dense", "--max-steps", 14)
    run(tiny, tmp_path / "whole", *flags)
    run(tiny, tmp_path / "pieces", *flags, "--grad-accum", 3)
    a, b = ([row["loss"] for row in rows(tmp_path / out) if "loss" in row] for out in ("whole", "pieces"))
    assert np.abs(np.array(a) - b).max() < 1e-5


def test_two_processes_are_one(tiny, tmp_path):
    """torchrun on two: the loss of one process to 1e-5 over 50 steps, masks bit-identical on both ranks throughout."""
    flags = [*tiny, "--method", "smp-s", "--dropout", "0", "--max-steps", "50", "--eval-every", "25"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASK_LOG": str(tmp_path), "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    for n in (1, 2):
        worker = [*torchrun, str(n), "--master-port", str(random.randint(20000, 60000)), __file__]
        done = subprocess.run(
            [*worker, *flags, "--out", str(tmp_path / str(n))], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    one, two = ([row["loss"] for row in rows(tmp_path / n) if "loss" in row] for n in "12")
    assert len(one) == 50 and np.abs(np.array(one) - two).max() < 1e-5
    masks = [(tmp_path / f"masks-2-{rank}").read_text().split() for rank in (0, 1)]
    assert masks[0] == masks[1] and len(set(masks[0])) > 40 and len(masks[0]) == 51
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in "12")
    assert one["achieved_density"] == two["achieved_density"]


def test_teacher(tiny, finished, tmp_path, capsys):
    """Half of the first loss comes from the saved teacher, whose score is printed before it teaches."""
    out = tmp_path / "student"
    run(tiny, out, "--method", "smp-s", "--teacher", finished / "dense", "--dropout", 0, "--max-steps", 1)
    assert f"teacher {finished / 'dense'}: accuracy" in capsys.readouterr().out.split("dev:")[0]
    teacher, task, tokenizer, s = evaluation.load_run(finished / "dense")
    data = load_dataset(task, "train", tokenizer, s["max_length"], s["data_dir"])
    batch = collate(data, batches(data.lengths, s["batch_size"], s["seed"], 0)[0])
    student = load_model(tiny[1], "words", words=word_ids(tokenizer, task.words))
    inputs = evaluation.inputs(batch, torch.device("cpu"))
    with torch.no_grad():
        logits, taught = student.eval()(**inputs), teacher.eval()(**inputs)
    loss = prune.distill(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"), logits, taught)
    assert rows(out)[0]["loss"] == pytest.approx(float(loss.mean()), abs=1e-5)


def test_every_method_takes_a_teacher(tiny, finished, tmp_path):
    for method in ("movement", "l0", "pins"):
        run(tiny, tmp_path / method, "--method", method, "--teacher", finished / "dense", "--max-steps", 2)
        taught = load_file(tmp_path / method / "checkpoint.safetensors")["teacher"]
        assert taught.shape == (203, 2) and torch.equal(taught, taught_by(finished / "dense" / "model", finished))


def taught_by(folder, finished, max_tokens=None):
    """The logits of the classifier in `folder` on train, computed anew."""
    _, task, tokenizer, s = evaluation.load_run(finished / "dense")
    data = load_dataset(task, "train", tokenizer, s["max_length"], s["data_dir"])
    model = load_model(folder, "classifier", 2, new_head=False)
    return evaluation.predict(model, data, torch.device("cpu"), "fp32", max_tokens)


def test_self_teacher_is_its_best_checkpoint(tiny, finished, tmp_path, monkeypatch):
    """A new teacher at each better evaluation and at no other; its table is, bit for bit, what the checkpoint says of
    each example in the same batches, to 1e-5 in others, also after a resume; and each is computed once."""
    tables, table_of = [], train.targets

    def noted(model, *rest):
        folder = tmp_path / f"teacher-{len(tables)}"
        train.save_model(folder, model, train.baked_state(model), tiny[1], ("no", "yes"))
        tables.append(table_of(model, *rest))
        return tables[-1]

    update = prune.Pins.update

    def interrupt(self, step):
        update(self, step)
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    flags = [*tiny, *"--method pins --lr 3e-4 --seed 1 --eval-every 1 --dropout 0 --out".split()]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "targets", noted)
        assert train.main([*flags, str(out)]) == 0
        assert len(tables) >= 4
        log, best, steps = rows(out), -1.0, []
        for row in log:
            if "metrics" in row and row["metrics"]["accuracy"] > best and row["step"] < 26:
                best = row["metrics"]["accuracy"]
                steps.append(row["step"])
        assert [row["step"] for row in log if "teacher" in row] == steps and len(tables) == len(steps)
        for i, table in enumerate(tables):
            assert torch.equal(table, taught_by(tmp_path / f"teacher-{i}", finished))
            assert (table - taught_by(tmp_path / f"teacher-{i}", finished, 150)).abs().max() < 1e-5
        assert torch.equal(load_file(out / "checkpoint.safetensors")["teacher"], tables[-1])
        computed = len(tables)
        patch.setattr(prune.Pins, "update", interrupt)
        assert train.main([*flags, str(tmp_path / "again")]) == 128 + signal.SIGTERM
        before = len(tables) - computed
        patch.setattr(prune.Pins, "update", update)
        assert train.main([*flags, str(tmp_path / "again"), "--resume"]) == 0
        assert len(tables) == 2 * computed and before > 0
    same(out, tmp_path / "again")
    run(tiny, tmp_path / "none", *flags[len(tiny) : -1], "--teacher", "none")
    losses = [[row["loss"] for row in rows(f) if "loss" in row] for f in (out, tmp_path / "none")]
    assert losses[0][: steps[0]] == losses[1][: steps[0]] and losses[0][steps[0]] != losses[1][steps[0]]


def test_self_teacher_of_scores(tiny, tmp_path):
    """A regression task: half the squared error to the label, half that to the teacher, at first the student itself."""
    source = Path(tiny[3]).parent
    for split in ("train", "dev"):
        lines = (source / f"{split}.tsv").read_text().replace("\tyes\n", "\t4.5\n").replace("\tno\n", "\t1.5\n")
        (tmp_path / f"{split}.tsv").write_text(lines)
    task = json.loads(Path(tiny[3]).read_text())
    del task["labels"]
    (tmp_path / "task.json").write_text(json.dumps(task | {"range": [0, 5], "metric": ["pearson", "spearman"]}))
    flags = [*tiny[:3], str(tmp_path / "task.json"), *tiny[4:]]
    run(flags, tmp_path / "out", *"--method pins --dropout 0 --max-steps 3 --eval-every 2".split())
    log, table = rows(tmp_path / "out"), load_file(tmp_path / "out" / "checkpoint.safetensors")["teacher"]
    _, task, tokenizer, s = evaluation.load_run(tmp_path / "out")
    data = load_dataset(task, "train", tokenizer, s["max_length"], s["data_dir"])
    batch = batches(data.lengths, s["batch_size"], s["seed"], 0)[2]
    error = (table[batch] - torch.from_numpy(data.labels[batch])) ** 2
    assert table.shape == (203,) and [row["step"] for row in log if "teacher" in row] == [2]
    assert [row["loss"] for row in log if "loss" in row][2] == pytest.approx(0.5 * float(error.mean()), rel=1e-4)


def test_self_teacher_from_a_dense_run_on_a_held_out_part(tiny, finished, tmp_path):
    """`self:RUN` is taught by the run until it is better itself; what is held out of train is not trained on."""
    flags = ("--method", "pins", "--teacher", f"self:{finished / 'dense'}", "--teacher-split", 0.2, "--lr", 1e-7)
    run(tiny, tmp_path / "out", *flags)
    table = load_file(tmp_path / "out" / "checkpoint.safetensors")["teacher"]
    everything = taught_by(finished / "dense" / "model", finished)
    assert not [row for row in rows(tmp_path / "out") if "teacher" in row]  # a student that stands still is not better
    _, task, tokenizer, s = evaluation.load_run(finished / "dense")
    data = load_dataset(task, "train", tokenizer, s["max_length"], s["data_dir"])
    rest, held = data.split(0.2, 0)
    assert (len(table), len(rest), len(held)) == (162, 162, 41)
    texts = [[tuple(d.ids[d.starts[i] : d.starts[i + 1]]) for i in range(len(d))] for d in (data, rest, held)]
    assert sorted(texts[0]) == sorted(texts[1] + texts[2])
    where = [texts[0].index(text) for text in texts[1]]
    assert (table - everything[where]).abs().max() < 1e-5
    assert np.array_equal(data.labels[where], rest.labels) and np.array_equal(data.second[where], rest.second)


def test_learning_rate():
    factors = [lr_at(t, 100, 0.1) for t in range(100)]
    assert factors[0] == 0 and factors[10] == 1 and factors[55] == pytest.approx(0.5) and factors[99] == 1 / 90
    assert [lr_at(t, 40, 0.0) for t in range(40)] == [(40 - t) / 40 for t in range(40)]


def test_recipes_are_the_published_ones():
    def of(**given):
        return train.settings_from(given)

    s = of(task="mnli", method="smp-s", density=0.1)
    assert (s.epochs, s.batch_size, s.score_lr, s.reg_lambda, s.max_length) == (12, 64, 2e-2, 400.0, 128)
    steps = 73_632  # of MNLI: 12 epochs of 6,136
    assert abs(s.ramp * steps - 43_632) < 50
    assert abs(of(task="mnli", density=0.7).ramp * steps - 5_250) < 50
    assert abs(of(task="mnli", density=0.8).ramp * steps - 3_500) < 50
    assert (of(task="rte").epochs, of(task="mrpc").epochs, of(task="mrpc").batch_size) == (100, 60, 32)
    temperatures = {0.03: 1, 0.5: 1, 0.7: 4, 0.8: 4}
    assert {v: of(task="qqp", density=v).temperature_s for v in temperatures} == temperatures
    assert of(task="mnli", density=0.5).temperature_s == 3
    assert of(task="mnli", density=0.5, teacher="x").temperature_s == 1
    assert of(task="cola", method="dense").density == 1 and of(task="cola", score_lr=0.5).score_lr == 0.5

    s = of(task="mnli", method="movement")  # published for SQuAD: 55,400 steps
    assert (s.epochs, s.batch_size, s.lr, s.score_lr) == (10, 16, 3e-5, 1e-2)
    assert abs(s.warmup * 55_400 - 5_400) < 5 and s.hold == s.warmup
    assert abs((1 - s.hold - s.ramp) * 55_400 - 10_800) < 10
    soft, l0 = of(task="mnli", method="soft-movement"), of(task="mnli", method="l0")
    assert (soft.density, soft.reg_lambda, l0.density, l0.reg_lambda, l0.score_lr) == (None, 400.0, None, 125.0, 0.1)
    s, steps = of(task="rte", method="pins"), 20 * 156
    assert (s.epochs, s.batch_size, s.lr, s.density, s.teacher) == (20, 16, 3e-5, 0.2, "self")
    assert (s.beta1, s.beta2, s.pins_window) == (0.85, 0.99, 10)
    assert abs(s.warmup * steps - 200) < 1 and s.hold == s.warmup and abs((1 - s.hold - s.ramp) * steps - 1_200) < 2


def test_evaluation_agrees_with_the_run(tiny, finished, capsys):
    """The saved folder, read by code that knows no masks, scores what the run measured in training."""
    for method in prune.METHODS:
        result = json.loads((finished / method / "result.json").read_text())
        model, task, tokenizer, s = evaluation.load_run(finished / method)
        dev = evaluation.load_dev(task, tokenizer, s["max_length"], s["data_dir"])
        assert evaluation.evaluate(model, task, dev, torch.device("cpu"), "fp32") == result["metrics"]
        if method not in ("dense", "smp-s"):
            continue
        assert evaluation.main([str(finished / method), "--data-dir", s["data_dir"]]) == 0
        assert f"accuracy     {100 * result['metrics']['accuracy']:.2f}" in capsys.readouterr().out


def test_predictions_file(tiny, finished, tmp_path):
    """index<TAB>prediction from 0 in file order, in the task's spelling, whatever the batching."""
    path = tmp_path / "pairs.tsv"
    s = json.loads((finished / "dense" / "config.json").read_text())["settings"]
    flags = ["--predictions", str(path), "--split", "dev", "--data-dir", s["data_dir"]]
    assert evaluation.main([str(finished / "dense"), *flags]) == 0
    header, *lines = path.read_text().splitlines()
    assert header == "index\tprediction" and [line.split("\t")[0] for line in lines] == [str(i) for i in range(60)]
    truth = [line.split("\t")[2] for line in (Path(s["task_file"]).parent / "dev.tsv").read_text().splitlines()[1:]]
    right = np.mean([line.split("\t")[1] == label for line, label in zip(lines, truth, strict=True)])
    assert right == json.loads((finished / "dense" / "result.json").read_text())["metrics"]["accuracy"]


def test_table_groups_seeds_and_nothing_else(tiny, finished, tmp_path, capsys):
    """Two seeds make one row with mean ± std; another method or pattern is another row, also beside an older run."""
    for seed in (0, 1):
        run(tiny, tmp_path / f"s{seed}", "--method", "smp-l", "--epochs", 1, "--seed", seed)
    run(tiny, tmp_path / "unit", "--method", "smp-l", "--epochs", 1, "--pattern", "unit")
    older = json.loads((tmp_path / "s1" / "config.json").read_text())
    del older["settings"]["pattern"]
    (tmp_path / "s1" / "config.json").write_text(json.dumps(older))
    capsys.readouterr()
    runs = [*(str(tmp_path / name) for name in ("s0", "s1", "unit")), *(str(finished / m) for m in ("smp-s", "dense"))]
    assert evaluation.main(runs) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[1] for row in cells] == ["dense", "smp-l", "smp-l (unit)", "smp-s"]
    assert [row[4] for row in cells] == ["1", "2", "1", "1"]
    scores = [100 * json.loads((Path(r) / "result.json").read_text())["metrics"]["accuracy"] for r in runs[:2]]
    assert cells[1][6].startswith(f"accuracy {np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}")


def mask_log():
    """The worker of test_two_processes_are_one: train.main, noting a hash of all masks after each update.

    From random scores, for tiny-bert the golden runs': from all ties, Adam's first step (lr * sign(g), nearly) leaves
    near-ties that the order of a summation decides.
    """
    update, init = prune.SMPShared.update, prune.SMPShared.__init__
    scores = np.load(Path(__file__).parent / "golden" / "scores_init.npz")

    def start(self, *args):
        init(self, *args)
        with torch.no_grad():
            for i, module in enumerate(self.linears):
                torch.nn.init.normal_(module.scores, generator=torch.Generator().manual_seed(i))
            for name, module in self.model.named_modules():
                if f"{name}.weight" in scores and scores[f"{name}.weight"].shape == module.weight.shape:
                    module.scores.copy_(torch.from_numpy(scores[f"{name}.weight"]))
    name = Path(os.environ["MASK_LOG"]) / f"masks-{os.environ['WORLD_SIZE']}-{os.environ['RANK']}"

    def noted(self, step):
        update(self, step)
        bits = b"".join(linear.mask.numpy().tobytes() for linear in self.linears)
        with open(name, "a") as log:
            log.write(hashlib.sha256(bits).hexdigest() + "\n")

    prune.SMPShared.update, prune.SMPShared.__init__ = noted, start
    sys.exit(train.main(sys.argv[1:]))


if __name__ == "__main__":
    mask_log()
