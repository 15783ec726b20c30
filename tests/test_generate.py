"""The kind "generate": decisions and losses, teachers, whole runs, and what is made of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_errors import refused
from test_train import flags_of, interrupted_at, result_of, rows, run, same
from tokenizers import AddedToken

import data
import eval as evaluation
import prune
import train
from data import get_task, load_dataset, with_settings
from kinds.classify import IGNORED
from kinds.generate import Generate
from models import runs
from models.checkpoint import load_model
from models.runs import load_run
from models.teacher import Teacher, frozen_copy
from models.tokenizer import load_tokenizer, set_end
from support.recipes import COMMON_OF_KIND
from tools import deploy, report

CPU = torch.device("cpu")
SETTINGS = {"beams": 3, "length_penalty": 1.0, "no_repeat_ngram": 0, "max_new_tokens": 16}
SETTINGS |= {"label_smoothing": 0.0, "eval_sources": 500}


def dataset_of(texts, split="train", **settings):
    """A split of the task of texts, as a run reads it."""
    task = with_settings(get_task(None, texts[3]), SETTINGS | settings, "here")
    tokenizer = load_tokenizer(texts[1], 400, framed=False)
    return load_dataset(task, split, tokenizer, 64, Path(texts[3]).parent / "data")


def model_of(texts, seed=0):
    """A model whose logits differ much."""
    model = load_model(texts[1], "vocabulary", form="vocabulary", seed=seed, dropout=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p *= 4 if p.dim() > 1 else 1
    return model


# ---------- decisions and losses ------------------------------------------------------------------


def alone(model, dataset, row):
    """The logits (n, V) of the decisions of one row, and what is right, by the definition."""
    ids = torch.from_numpy(dataset.ids[dataset.tokens(row)]).long()
    first = int(dataset.second[row])
    return model(ids[None])[0, first - 1 : -1], ids[first:]


@pytest.mark.parametrize("mode", ["none", "distill", "self"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients(mode, smoothing, texts):
    """The loss and gradients of a batch are those of the written definition, to 1e-6.

    So they are with more padding, in micro-batches, and as the mean of two ranks. Smoothing changes
    the task's part alone.
    """
    dataset = dataset_of(texts, label_smoothing=smoothing)
    order = np.argsort(dataset.lengths, kind="stable")
    batch = order[:: len(order) // 6][:6]
    net = model_of(texts)
    other = model_of(texts, seed=3).eval()
    teacher = Teacher({"distill": "RUN", "self": "self", "none": "none"}[mode])
    if mode != "none":
        teacher.table = frozen_copy(other, other.state_dict())
    parameters = list(net.parameters())

    losses = []
    for row in batch:
        said, right = alone(net, dataset, row)
        taught, _ = alone(other, dataset, row)
        said, taught = said.double(), taught.double()
        log_p = said.log_softmax(-1)
        nll = -log_p.gather(1, right[:, None])[:, 0]
        task = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
        at_2 = (said / 2).log_softmax(-1)
        p_teacher = (taught / 2).softmax(-1).detach()
        if mode == "distill":
            kl = (p_teacher * (p_teacher.log() - at_2)).sum(-1)
            task = 0.5 * task + 0.5 * 4 * kl
        elif mode == "self":
            p = log_p.detach()
            a = 1 + (p.exp() * p).sum(-1) / np.log(said.size(-1))
            task = (1 - a) * task - a * 4 * (p_teacher * at_2).sum(-1)
        losses.append(task)
    loss = torch.cat(losses).mean()
    expected = torch.autograd.grad(loss, parameters)

    def gradients(parts, padding=0):
        total = 0.0
        for part, factor in parts:
            rows_of = dataset.collate(part)
            for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
                rows_of[name] = torch.nn.functional.pad(rows_of[name], (0, padding), value=fill)
            rows_of["reads"] = (rows_of["labels"].flatten() != IGNORED).nonzero()[:, 0]
            decided = dataset.kind.decide(net, rows_of, CPU, "fp32")
            total = total + teacher.losses(dataset.kind, decided).sum() * factor
        return float(total.detach()), torch.autograd.grad(total, parameters)

    count = dataset.decision_counts[batch].sum()
    assert count == sum(len(alone(net, dataset, row)[1]) for row in batch)
    ways = [gradients(data.micro_batches(batch, count, 0, 1, 1))]
    ways.append(gradients(data.micro_batches(batch, count, 0, 1, 1), padding=8))
    ways.append(gradients(data.micro_batches(batch, count, 0, 1, 4)))
    ranks = [gradients(data.micro_batches(batch, count, rank, 2, 2)) for rank in (0, 1)]
    mean = [(a + b) / 2 for a, b in zip(ranks[0][1], ranks[1][1])]
    ways.append(((ranks[0][0] + ranks[1][0]) / 2, mean))
    for value, found in ways:
        assert value == pytest.approx(float(loss.detach()), abs=1e-6, rel=1e-6)
        for ours, theirs in zip(found, expected):
            assert (ours - theirs).abs().max() < 1e-6


def test_a_frozen_copy_is_the_model_with_its_masks(texts):
    """A teacher computes what the student computed in evaluation, and does not change with it."""
    model = model_of(texts)
    for linears in prune.mask_matrices(model).values():
        for linear in linears:
            linear.mask.copy_(torch.rand(linear.mask.shape) > 0.5)
    ids = torch.randint(0, 300, (2, 9))
    before = model.eval()(ids)
    copy = frozen_copy(model, runs.baked_state(model))
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.layers[0].mlp["c_fc"].weight.zero_()
    assert (copy(ids) - before).abs().max() < 1e-5
    assert not any(p.requires_grad for p in copy.parameters())


# ---------- whole runs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """A folder with finished runs of the methods dense and smp-s."""
    folder = tmp_path_factory.mktemp("finished")
    options = {"method": "dense", "max_steps": 300, "lr": 5e-3, "warmup": 0.1, "dropout": 0}
    run(texts, folder / "dense", **options, eval_every=300)
    options = {"method": "smp-s", "density": 0.5, "max_steps": 20}
    model = ["--model", str(folder / "dense" / "model")]
    run([*model, *texts[2:]], folder / "smp-s", **options)
    return folder


@pytest.mark.parametrize("method", prune.CRITERIA)
def test_every_method_runs(method, texts, tmp_path, capsys):
    """Each trains with a teacher that computes beside it, and nothing but its own head."""
    out = tmp_path / "run"
    own = {"hold": 0, "ramp": 0.2, "pins_window": 1}
    options = {name: own[name] for name in own.keys() & prune.METHODS[method].uses}
    options |= {"method": method, "eval_every": 2, "teacher": "self", "max_steps": 3}
    result = run(texts, out, **options)
    losses = [row["loss"] for row in rows(out) if "loss" in row]
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert [row["step"] for row in rows(out) if "teacher" in row] == [2]
    assert list(result["metrics"]) == ["bleu", "nist"]
    told = capsys.readouterr().out
    assert "(greedy, at most 16 new tokens" in told
    assert "(3 beams, length penalty " in told.splitlines()[-1]
    model, _, _, _ = load_run(out)
    assert model.output_head == "vocabulary"
    assert evaluation.main([str(out)]) == 0


@pytest.mark.parametrize("pattern, density", [("head", 0.5), ("unit", 0.25), ("2:4", 0.5)])
def test_patterns(pattern, density, texts, tmp_path):
    """Whole heads, whole units, or two of four neighbours of a decoder are kept."""
    out = tmp_path / "run"
    run(texts, out, method="movement", pattern=pattern, density=density, max_steps=8, beams=1)
    model, _, _, _ = load_run(out)
    kept = model.layers[0].mlp["c_fc"].weight != 0  # (F, C)
    if pattern == "2:4":
        assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    else:
        assert set(kept.float().mean(1).tolist()) == {0.0, 1.0}
    if pattern == "head":
        rows_of_heads = (model.layers[0].attn.value.weight != 0).unflatten(0, (4, -1))
        assert sorted(rows_of_heads.float().mean((1, 2)).tolist()) == [0.0, 0.0, 1.0, 1.0]


def test_smp_trains_scores_alone(finished):
    """At no density has SMP a new weight: what it saves are scores, and the head is the base's."""
    tensors = load_file(finished / "smp-s" / "checkpoint.safetensors")
    trained = [name for name in tensors if not name.startswith(("optimizer.", "method."))]
    assert trained and all(name.endswith(".scores") for name in trained)
    base = load_file(finished / "dense" / "model" / "model.safetensors")
    ours = load_file(finished / "smp-s" / "model" / "model.safetensors")
    assert torch.equal(base["transformer.wte.weight"], ours["transformer.wte.weight"])
    kept = [float((t != 0).float().mean()) for name, t in ours.items() if ".c_fc.weight" in name]
    assert np.mean(kept) == pytest.approx(0.5, abs=0.05)


def test_a_tiny_model_learns(finished):
    assert result_of(finished / "dense")["metrics"]["bleu"] > 0.5


def test_a_part_of_train_is_written_anew(texts, finished):
    """For a row of a training set the source alone is the prompt, and its text the reference."""
    model, task, tokenizer, _ = load_run(finished / "dense")
    train_set = load_dataset(task, "train", tokenizer, 64, texts[5])
    rest, part = train_set.split(0.2, 0)
    assert len(part) == 40 and len(rest) + len(part) == len(train_set)
    said = part.kind.predict(model, part, CPU, "fp32")
    dev = load_dataset(task, "dev", tokenizer, 64, texts[5], "dev")
    of_dev = dict(
        zip([source for source, _ in dev.examples], dev.kind.predict(model, dev, CPU, "fp32"))
    )
    for ((source, _), [right]), text in zip(part.examples, said):
        assert right in (train_set.examples[i][1][0] for i in range(len(train_set)))
        assert of_dev.get(source, text) == text
    assert len({source for (source, _), _ in part.examples} & of_dev.keys()) > 5


def test_metrics_that_are_not_defined(texts, capsys):
    """They count as 0, with a warning: a run goes on, and none of them is the best."""
    kind = dataset_of(texts, "dev").kind
    right = [["a b c d e f g h i j k l"]] * 40
    empty = kind.measure([right[0][0], *[""] * 39], right)
    assert empty == {"bleu": 0.0, "nist": 0.0}
    told = capsys.readouterr().err
    assert "warning: bleu counts as 0: most outputs are empty" in told
    assert "warning: nist counts as 0: the outputs have no 3 tokens in a row" in told


def test_what_is_measured_when(texts, tmp_path, capsys):
    """During training some dev sources are measured, greedily; at the end all, with beams.

    The best checkpoint is chosen among evaluations of one kind.
    """
    result = run(texts, tmp_path / "a", method="dense", eval_sources=5, eval_every=4, lr=2e-3)
    measured = [row for row in rows(tmp_path / "a") if "metrics" in row]
    assert [row["step"] for row in measured] == [4, 8, 12]
    best = max(measured, key=lambda row: row["metrics"]["bleu"])
    assert result["best"]["metrics"] == best["metrics"]
    model, task, tokenizer, s = load_run(tmp_path / "a")
    dev = load_dataset(task, "dev", tokenizer, 64, texts[5], "dev")
    assert result["metrics"] == evaluation.evaluate(model, {"dev": dev}, CPU, "fp32")
    quick = dev.kind.quick(dev)
    assert len(quick) == 5
    assert quick.gold == [dev.gold[i * len(dev) // 5] for i in range(5)]
    assert measured[-1]["metrics"] == evaluation.evaluate(model, {"dev": quick}, CPU, "fp32")


@pytest.mark.parametrize("method", ["pins", "smp-s"])
def test_resume_with_a_teacher(method, texts, tmp_path, capsys):
    """A run that teaches itself, interrupted and resumed, ends bit for bit so."""
    options = {"method": method, "teacher": "self", "teacher_split": 0.2, "eval_every": 3}
    options |= {"max_steps": 16, "lr": 1e-3, "max_tokens": 300, "label_smoothing": 0.1}
    place = texts.index("--batch-size")
    flags = texts[:place] + texts[place + 2 :]
    run(flags, tmp_path / "a", **options)
    again = tmp_path / "b"
    argv = [*flags, *flags_of(**options), "--out", str(again)]
    Method = prune.METHODS[method]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "update", interrupted_at(10, Method.update))
        assert train.main(argv) != 0
    (teacher,) = again.glob("teacher-*.safetensors")
    whole = teacher.read_bytes()
    teacher.write_bytes(whole[:-1])
    refused(capsys, [*argv, "--resume"], f"{teacher}: missing or damaged")
    teacher.write_bytes(whole)
    assert train.main([*argv, "--resume"]) == 0
    same(tmp_path / "a", again)


def test_a_dense_run_teaches(finished, texts, tmp_path, capsys):
    """A dense run is a teacher; so is a folder in Hugging Face's layout; another task's is none."""
    for teacher in (finished / "dense", finished / "dense" / "model"):
        out = tmp_path / teacher.name
        run(texts, out, method="smp-l", teacher=teacher, max_steps=2)
        assert f"teacher {teacher}: bleu" in capsys.readouterr().out
    argv = [*texts, "--method", "smp-l", "--teacher", texts[1], "--out", tmp_path / "x"]
    refused(capsys, argv, f"{texts[1]}: no weights")


def test_go_on(finished, texts, tmp_path):
    """`fixed` keeps the zeros of a run; movement goes on from a folder."""
    out = tmp_path / "fixed"
    model = ["--model", str(finished / "dense" / "model")]
    flags = [*model, *texts[2:]]
    argv = [*flags, "--method", "fixed", "--from", str(finished / "smp-s"), "--out", str(out)]
    assert train.main(argv) == 0
    result = result_of(out)
    assert result["achieved_density"] == pytest.approx(0.5, abs=1e-3)
    argv = [*texts, "--method", "magnitude", "--from", str(finished / "dense" / "model")]
    assert train.main([*argv, "--density", "0.5", "--out", str(tmp_path / "m")]) == 0


# ---------- what is made of runs ------------------------------------------------------------------


def test_predictions_and_scores(finished, texts, tmp_path, capsys):
    """A line per source; `--score` finds what the run reported; the settings are printed."""
    path = tmp_path / "said.txt"
    run_folder = str(finished / "dense")
    argv = [run_folder, "--predictions", str(path), "--split", "dev"]
    assert evaluation.main(argv) == 0
    dev = dataset_of(texts, "dev")
    assert len(path.read_text().splitlines()) == len(dev)
    capsys.readouterr()
    argv = ["--task-file", texts[3], "--split", "dev", "--score", str(path)]
    assert evaluation.main(argv) == 0
    metrics = result_of(finished / "dense")["metrics"]
    told = f"bleu {100 * metrics['bleu']:.2f}  nist {metrics['nist']:.4f}"
    assert capsys.readouterr().out == f"{path}: {told}\n"
    assert evaluation.main([run_folder]) == 0
    assert "(3 beams, length penalty 1, at most 16 new tokens)" in capsys.readouterr().out
    assert evaluation.main([run_folder, "--split", "test", "--predictions", str(path) + "2"]) == 0


def test_published_figures_of_another_scorer(capsys):
    """A score on WebNLG or DART says that the published figures cannot be compared with it."""
    for name, said in (("webnlg", True), ("dart", True), ("e2e", False)):
        kind = data.kind_of(with_settings(get_task(name), SETTINGS, "here"))
        assert ("GenerationEval" in kind.how) == ("GenerationEval" in kind.note) == said


def test_input(finished, tmp_path, capsys):
    """Each source of your own is answered with a text, in the order of the file."""
    path = tmp_path / "mine.csv"
    path.write_text('source\n"name : Bibi | food : soup"\n"name : Zizzi | food : cake"\n')
    assert evaluation.main([str(finished / "dense"), "--input", str(path)]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header == "prediction\tsource"
    assert "Bibi" in first.split("\t")[0] and first.endswith("\tname : Bibi | food : soup")
    assert "Zizzi" in second.split("\t")[0]
    assert evaluation.main([str(finished / "dense"), "--input", str(tmp_path / "no")]) == 2


def test_the_end_is_not_written(finished, texts):
    """Also where the tokenizer does not call it special."""
    kind = dataset_of(texts, "dev").kind
    kind.tokenizer_used.add_tokens([AddedToken("<stop>", special=False)])
    set_end(kind.tokenizer_used, "<stop>", "here")
    ids = kind.tokenizer_used.encode("Bibi has fish.").ids
    assert ids[-1] == kind.end and kind.write(torch.tensor(ids)) == "Bibi has fish."


def test_a_long_source_shortens_all_texts(texts, capsys):
    """The model has as many positions; a line says how many new tokens are left."""
    model = model_of(texts)
    dataset = dataset_of(texts, "dev", max_new_tokens=model.config.positions)
    dataset.kind.predict(model, dataset, torch.device("cpu"), torch.float32)
    longest = dataset.second.max()
    positions = model.config.positions
    left = f"at most {positions + 1 - longest} new tokens: the longest source leaves no more"
    assert left in capsys.readouterr().err


def test_reports(finished, texts, tmp_path, capsys):
    """A table with BLEU in percent and NIST as it is; other densities of the same scores."""
    capsys.readouterr()
    assert report.main([str(finished / "dense"), str(finished / "smp-s")]) == 0
    out = capsys.readouterr().out
    metrics = result_of(finished / "dense")["metrics"]
    assert f"bleu {100 * metrics['bleu']:.1f}, nist {metrics['nist']:.3f}" in out
    argv = [str(finished / "smp-s"), "--density", "0.5", "--data-dir", texts[5]]
    assert report.main(argv) == 0
    metrics = result_of(finished / "smp-s")["metrics"]
    assert f"nist {metrics['nist']:.4f}" in capsys.readouterr().out


def test_mask_files(finished, texts, tmp_path, capsys):
    check_mask_files(finished, texts, tmp_path, capsys)


def check_mask_files(finished, flags, tmp_path, capsys):
    """SMP's mask over the base is the task: the same metrics."""
    mask = tmp_path / "meals.mask"
    assert deploy.main(["save-mask", str(finished / "smp-s"), str(mask)]) == 0
    base = str(finished / "dense" / "model")
    capsys.readouterr()
    argv = ["masks", base, str(mask), "--task-file", flags[3], "--data-dir", flags[5]]
    assert deploy.main(argv) == 0
    metrics = result_of(finished / "smp-s")["metrics"]
    assert f"nist {metrics['nist']:.4f}" in capsys.readouterr().out


def test_settings(texts, tiny, capsys, tmp_path):
    """Settings of texts are refused for other kinds; those of a task file's unknown key, too."""
    argv = [*tiny, "--method", "dense", "--beams", "4", "--out", tmp_path / "x"]
    refused(capsys, argv, "--beams 4: classify does not use it")
    argv = [*texts, "--method", "smp-s", "--pattern", "head", "--max-length", 65]
    refused(capsys, [*argv, "--out", tmp_path / "x"], "--max-length 65", "64 positions")


@pytest.mark.real
def test_exports_generate_the_same(finished, texts, tmp_path):
    """transformers, with the settings of the exported folder alone, writes the same texts."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "export"
    assert deploy.main(["export", str(finished / "smp-s"), str(folder)]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours, task, own, _ = load_run(finished / "smp-s")
    dev = load_dataset(task, "dev", own, 64, texts[5], "dev")
    said = dev.kind.predict(ours, dev, CPU, "fp32")
    for (source, _), text in list(zip(dev.examples, said))[:10]:
        inputs = tokenizer(source, return_tensors="pt")
        tokens = model.generate(**inputs)[0, inputs["input_ids"].size(1) :]
        theirs = tokenizer.decode(tokens, skip_special_tokens=True)
        assert " ".join(theirs.split()) == text
    assert json.loads((folder / "generation_config.json").read_text())["num_beams"] == 3
    shutil.rmtree(folder)


def test_further_metrics_are_checked_first(finished, tiny, tmp_path, capsys, monkeypatch):
    """Before anything is generated a line says what is missing, or that there are none."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Generate, "predict", None)
    argv = [finished / "dense", "--metrics", "all"]
    refused(capsys, argv, "METEOR, ROUGE-L and CIDEr need Java", main=evaluation.main)
    argv = ["--task-file", tiny[3], "--score", tmp_path / "no", "--metrics", "all"]
    refused(capsys, argv, "a classify task has no further metrics", main=evaluation.main)
    argv = [finished / "dense", "--metrics", "all", "--predictions", tmp_path / "p"]
    refused(capsys, argv, "--metrics does not go with --predictions", main=evaluation.main)


def test_a_mask_without_decoding_settings(finished, tmp_path, capsys, monkeypatch):
    """A released mask does not say how texts are decoded; one line says so."""
    monkeypatch.setitem(COMMON_OF_KIND, "generate", {"max_length": 64})  # what the model takes
    base = finished / "dense" / "model"
    masks = load_file(finished / "smp-s" / "scores.safetensors")
    names = sorted((n for n in masks if n.endswith(".mask")), key=lambda n: f"{n}_scores")
    bits = np.concatenate([masks[name].numpy().reshape(-1) for name in names])
    np.save(tmp_path / "m.npy", np.packbits(bits))
    argv = ["masks", base, tmp_path / "m.npy", "--task", "e2e"]
    refused(capsys, argv, "m.npy: expected the settings beams", main=deploy.main)
