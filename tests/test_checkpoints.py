"""Other people's checkpoints: heads by their labels, what a model leaves out, teachers, origins."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, score_task
from safetensors.torch import load_file, save_file
from test_errors import edit_json, refused
from test_model import inputs
from test_train import rows, run

import train
from data import KINDS, get_task
from kinds.score import Score
from model import gelu
from models.checkpoint import load_model, read_config
from models.runs import load_run
from support.recipes import recipe
from support.terminal import UserError, show

TINY = GOLDEN / "tiny-bert"
WEIGHTS = "model.safetensors"
LABELS = {
    "classify": ["no", "yes"],
    "score": ["score"],
    "span": ["start", "end"],
    "tag": ["O", "B-A", "I-A"],
}


def foreign(folder, kind, names, order=None, architecture="bert", seed=0):
    """A fine-tuned model of a kind in Hugging Face's layout; its rows are those of `names`."""
    torch.manual_seed(seed)
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / WEIGHTS)
    name = "qa_outputs" if kind == "span" else "classifier"
    count = len(names)
    head = {"weight": torch.randn(count, 32), "bias": torch.randn(count)}
    order = order or list(range(count))
    head = {f"{name}.{key}": value[order] for key, value in head.items()}
    if architecture == "roberta":
        tensors, head = as_roberta(tensors, head, pooled=kind in ("classify", "score"))
        edit_json(folder / "config.json", model_type="roberta")
    save_file({k: v.contiguous() for k, v in (tensors | head).items()}, folder / WEIGHTS)
    edit_json(folder / "config.json", id2label=dict(enumerate(names)))
    return folder


def as_roberta(tensors, head, pooled):
    """The same tensors under RoBERTa's names."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("bert.pooler.dense."):
            if pooled:
                renamed[name.replace("bert.pooler.", "classifier.")] = tensor
        elif not name.startswith("cls."):
            renamed[name.replace("bert.", "roberta.")] = tensor
    if pooled:
        head = {name.replace("classifier.", "classifier.out_proj."): t for name, t in head.items()}
    return renamed, head


def loaded(folder, kind, **options):
    labels = LABELS[kind]
    form = KINDS[kind].form
    return load_model(folder, "classifier", len(labels), labels=labels, form=form, **options)


def head_of(model):
    return model.get_parameter(f"{model.head_name}.weight")


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@pytest.mark.parametrize("kind", ["classify", "span", "tag"])
def test_a_head_goes_by_its_labels(kind, architecture, tmp_path, capsys):
    """The rows of a head come into the order of the task, whatever order and case they are in."""
    labels = LABELS[kind]
    straight = foreign(tmp_path / "a", kind, labels, architecture=architecture)
    expected = head_of(loaded(straight, kind))
    turned = list(range(len(labels)))[::-1]
    names = [label.upper() for label in labels[::-1]]
    folder = foreign(tmp_path / "b", kind, names, turned, architecture)
    assert torch.equal(head_of(loaded(folder, kind)), expected)
    assert capsys.readouterr().out == ""


def test_labels_that_differ_in_case_alone(tmp_path):
    """Where two labels differ in case alone, case counts."""
    folder = foreign(tmp_path / "a", "classify", ["Yes", "yes"])
    straight = load_file(folder / WEIGHTS)["classifier.weight"]
    for labels, expected in ((["Yes", "yes"], straight), (["yes", "Yes"], straight.flip(0))):
        model = load_model(folder, "classifier", 2, labels=labels)
        assert torch.equal(head_of(model), expected)
    other = load_model(folder, "classifier", 2, labels=["YES", "x"])
    assert not torch.equal(head_of(other), straight)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@pytest.mark.parametrize("kind", ["classify", "score", "tag"])
@pytest.mark.parametrize("names", ["others", "unnamed", "more"])
def test_another_head_is_new(names, kind, architecture, tmp_path, capsys):
    """A head for other labels, without names or for more labels is not taken; one line says so."""
    labels = LABELS[kind]
    given = {
        "others": [f"x{i}" for i in range(len(labels))],
        "unnamed": [f"LABEL_{i}" for i in range(len(labels))],
        "more": [*labels, "z"],
    }[names]
    folder = foreign(tmp_path / "a", kind, given, architecture=architecture)
    model = loaded(folder, kind, seed=3)
    said = capsys.readouterr().out
    assert "a new one is drawn" in said and said.count("\n") == 1
    assert head_of(model).std() < 0.1  # N(0, 0.02), and not what the file holds
    if names == "others":
        with pytest.raises(UserError, match="its output head is for .x0.*; expected"):
            loaded(folder, kind, new_head=False)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_head_of_every_token_is_another(architecture, tmp_path, capsys):
    """Where a class needs a pooler and the folder has none, its head was not for this."""
    folder = foreign(tmp_path / "a", "tag", LABELS["classify"], architecture=architecture)
    state = load_file(folder / WEIGHTS)
    save_file({n: t for n, t in state.items() if ".pooler." not in n}, folder / WEIGHTS)
    model = loaded(folder, "classify")
    assert head_of(model).std() < 0.1  # N(0, 0.02), and not what the file holds
    line = "its output head is for every token, without a pooler; a new one is drawn"
    assert line in capsys.readouterr().out
    with pytest.raises(UserError, match="every token, without a pooler; expected"):
        loaded(folder, "classify", new_head=False)


def test_a_span_head_has_its_names_by_its_class(tmp_path, capsys):
    """The rows of BertForQuestionAnswering are start and end, if config.json names none."""
    folder = foreign(tmp_path / "a", "span", ["LABEL_0", "LABEL_1"])
    model = loaded(folder, "span")
    assert torch.equal(head_of(model), load_file(folder / WEIGHTS)["qa_outputs.weight"])
    assert capsys.readouterr().out == ""


def changed(folder, **tensors):
    """tiny-bert with more tensors; "_" in a name stands for "."."""
    shutil.copytree(TINY, folder)
    state = load_file(folder / WEIGHTS)
    state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(state, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("rows_more", [0, 8])
def test_what_a_model_does_not_use_is_named(rows_more, tmp_path, capsys):
    """An untied or longer decoder is refused for label words, and named where nothing uses it."""
    decoder = torch.randn(120 + rows_more, 32)
    bias = torch.randn(120 + rows_more)
    more = {"cls__predictions__decoder__weight": decoder, "loss_fct__weight": torch.ones(2)}
    more |= {"cls__predictions__bias": bias}
    folder = changed(tmp_path / "a", **more)
    model = loaded(folder, "classify")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "not used" in said and "decoder.weight" in said and "loss_fct.weight" in said
    expected = loaded(TINY, "classify")
    assert torch.equal(model(**inputs()), expected(**inputs()))
    with pytest.raises(UserError, match="decoder.weight differs from the word embeddings"):
        load_model(folder, "words", words=[5, 7])


def test_what_the_encoder_would_use_is_refused(tmp_path):
    """A tensor inside the encoder that our model lacks means that it computes something else."""
    name = "bert__encoder__layer__0__attention__self__distance_embedding__weight"
    folder = changed(tmp_path / "a", **{name: torch.ones(3, 8)})
    with pytest.raises(UserError, match="unknown bert.encoder.layer.0.attention"):
        loaded(folder, "classify")


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_one_token_type(architecture, tmp_path):
    """With type_vocab_size 1 every token has the type 0, whatever the tokenizer gives."""
    folder = foreign(tmp_path / "a", "classify", LABELS["classify"], architecture=architecture)
    state = load_file(folder / WEIGHTS)
    (name,) = [name for name in state if "token_type" in name]
    save_file(state | {name: state[name][:1].contiguous()}, folder / WEIGHTS)
    edit_json(folder / "config.json", type_vocab_size=1)
    model = loaded(folder, "classify").eval()
    batch = inputs()
    assert batch["token_type_ids"].any()
    zeros = batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    assert torch.equal(model(**batch), model(**zeros))


def test_padding_inside_a_text_has_no_position(tmp_path):
    """RoBERTa does not count its padding token, also where a text holds it (transformers)."""
    folder = foreign(tmp_path / "a", "classify", LABELS["classify"], architecture="roberta")
    edit_json(folder / "config.json", pad_token_id=1)
    embeddings = loaded(folder, "classify").embeddings
    ids = torch.tensor([[0, 5, 1, 6, 2]])
    rows = embeddings.position_embeddings.weight[[2, 3, 1, 4, 5]]
    assert torch.equal(embeddings.positions(ids)[0], rows)


@pytest.mark.parametrize("model_type, padding", [("bert", 0), ("roberta", 1)])
def test_no_padding_id(model_type, padding, tmp_path):
    """A padding id that is null or absent is that of the architecture."""
    for value in (None, "absent"):
        config = json.loads((TINY / "config.json").read_text()) | {"model_type": model_type}
        config["pad_token_id"] = value
        if value:
            del config["pad_token_id"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_config(tmp_path)[1].pad_token_id == padding


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_gelu_by_tanh(name, tmp_path):
    """The form of GELU by tanh is computed, and written into what is saved."""
    folder = changed(tmp_path / "a")
    edit_json(folder / "config.json", hidden_act=name)
    model = loaded(folder, "classify").eval()
    assert model.config.hidden_act == name
    difference = (model(**inputs()) - loaded(TINY, "classify").eval()(**inputs())).abs().max()
    assert 0 < difference < 1e-2
    x = torch.linspace(-3, 3, 50)
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    assert torch.allclose(gelu(x, name), 0.5 * x * (1 + torch.tanh(inner)), atol=1e-6)


def test_the_recipe_goes_by_the_architecture(tiny, tmp_path):
    """`model_type` decides on RoBERTa's recipe, and not a name in the path."""
    for name, model_type, power in (("roberta", "bert", 3), ("x", "roberta", 1)):
        shutil.copytree(tiny[1], tmp_path / name)
        edit_json(tmp_path / name / "config.json", model_type=model_type)
        given = {"model": str(tmp_path / name), "task": "rte", "method": "smp-s"}
        assert train.settings_from(given).ramp_power == power
    assert recipe("smp", "classify", "rte", "roberta", 0.1, False)["ramp_power"] == 1


# --------------------------------------------------------------------------------------------------
# teachers and origins in Hugging Face's layout


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("dense") / "run"
    run(tiny, out, method="dense", lr=1e-3)
    return out


@pytest.fixture
def turned(dense, tmp_path):
    """The dense model as a foreign folder, with its two labels in the other order."""
    folder = tmp_path / "turned"
    shutil.copytree(dense / "model", folder)
    state = load_file(folder / WEIGHTS)
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name].flip(0).contiguous()
    save_file(state, folder / WEIGHTS)
    edit_json(folder / "config.json", id2label={"0": "yes", "1": "no"})
    return folder


def test_a_foreign_teacher(tiny, dense, turned, tmp_path, capsys):
    """A folder teaches as the run does that it is from, in whatever order its labels are."""
    losses = {}
    for name, teacher in (("run", dense), ("folder", turned)):
        capsys.readouterr()
        out = tmp_path / name
        run(tiny, out, method="smp-s", teacher=teacher, max_steps=4)
        losses[name] = [row["loss"] for row in rows(out) if "loss" in row]
        out = capsys.readouterr().out
        assert f"teacher {teacher}: accuracy" in out
    assert losses["run"] == losses["folder"]


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@pytest.mark.parametrize("kind", ["classify", "score", "span", "tag"])
def test_a_foreign_teacher_of_each_kind(kind, architecture, tiny, kinds, tmp_path, capsys):
    """The folder of a dense run teaches and begins runs of each kind, its labels turned around.

    The teacher's own metrics are those of the run. So are those of a run that begins with it.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny[1], base)
    if architecture == "roberta":
        state, _ = as_roberta(load_file(base / WEIGHTS), {}, pooled=False)
        save_file(state, base / WEIGHTS)
        edit_json(base / "config.json", model_type="roberta")
    files = kinds | {"classify": tiny[3], "score": str(score_task(tiny, tmp_path))}
    flags = [*tiny, "--model", str(base), "--task-file", files[kind]]
    flags += ["--max-steps", "3", "--method", "dense"]
    result = run(flags, tmp_path / "dense", lr=1e-3)
    folder = tmp_path / "folder"
    shutil.copytree(tmp_path / "dense" / "model", folder)
    if kind in ("classify", "tag"):
        state = load_file(folder / WEIGHTS)
        for name in state:
            if name.startswith("classifier.") and "dense" not in name:
                if architecture == "bert" or kind == "tag" or "out_proj" in name:
                    state[name] = state[name].flip(0).contiguous()
        save_file(state, folder / WEIGHTS)
        names = json.loads((folder / "config.json").read_text())["id2label"].values()
        edit_json(folder / "config.json", id2label=dict(enumerate(reversed(list(names)))))
    capsys.readouterr()
    run(flags, tmp_path / "taught", teacher=folder)
    assert f"teacher {folder}: {show(result['metrics'])}" in capsys.readouterr().out
    options = {"method": "fixed", "lr": 0, "max_steps": 1}
    again = run([*flags, "--from", str(folder)], tmp_path / "on", **options)
    assert again["metrics"] == result["metrics"]


def test_a_foreign_origin(tiny, dense, turned, tmp_path):
    """--from takes a folder: weights and head go on where they were."""
    out = tmp_path / "out"
    run([*tiny, "--from", str(turned)], out, method="fixed", lr=0, max_steps=1)
    model, _, _, _ = load_run(out)
    before, _, _, _ = load_run(dense)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    run([*tiny, "--from", str(turned)], tmp_path / "pins", method="pins", max_steps=13)


def test_folders_that_cannot_teach(tiny, turned, tmp_path, capsys):
    """Other labels, another vocabulary, fewer positions or no head are refused by name."""
    flags = [*tiny, "--out", tmp_path / "run", "--teacher"]
    bad = {}
    for name in ("labels", "unnamed", "words", "short", "headless"):
        shutil.copytree(turned, tmp_path / name)
        bad[name] = tmp_path / name
    edit_json(bad["labels"] / "config.json", id2label={"0": "a", "1": "b"})
    refused(capsys, [*flags, bad["labels"]], bad["labels"], '"a, b"; expected "no, yes"')
    edit_json(bad["unnamed"] / "config.json", id2label={"0": "LABEL_0", "1": "LABEL_1"})
    refused(capsys, [*flags, bad["unnamed"]], "2 labels without names")
    text = (bad["words"] / "tokenizer.json").read_text().replace('"w7"', '"v7"')
    (bad["words"] / "tokenizer.json").write_text(text)
    refused(capsys, [*flags, bad["words"]], "vocabulary differs")
    state = load_file(bad["headless"] / WEIGHTS)
    state = {name: t for name, t in state.items() if "classifier" not in name}
    save_file(state, bad["headless"] / WEIGHTS)
    refused(capsys, [*flags, bad["headless"]], "missing classifier.weight")
    state = load_file(bad["short"] / WEIGHTS)
    name = "bert.embeddings.position_embeddings.weight"
    save_file(state | {name: state[name][:16].contiguous()}, bad["short"] / WEIGHTS)
    edit_json(bad["short"] / "config.json", max_position_embeddings=16)
    refused(capsys, [*flags, bad["short"]], "16 positions")
    refused(capsys, [*tiny, "--out", tmp_path / "x", "--from", turned], "not a run; smp-s")


def test_a_teacher_of_another_range(monkeypatch, capsys):
    """A teacher that is worse than the mean label is told, such as one from 0 to 1."""
    labels = np.array([0, 1, 2.5, 4, 5], np.float32)
    kind = Score(get_task("stsb"))
    for scale, lines in ((0.9, 0), (0.2, 1), (-1, 1)):
        logits = torch.from_numpy(scale * labels)[:, None]
        monkeypatch.setattr(kind, "logits", lambda *args, logits=logits: logits)
        table = kind.teach(None, SimpleNamespace(labels=labels), torch.device("cpu"), "fp32")
        assert torch.equal(table, logits[:, 0])
        assert capsys.readouterr().err.count("further from the labels than their mean") == lines


def test_a_foreign_score_teaches(tiny, tmp_path):
    """A model with one output needs no names to teach a score."""
    task = str(score_task(tiny, tmp_path))
    flags = [*tiny, "--task-file", task, "--max-steps", "2"]
    run(flags, tmp_path / "dense", method="dense")
    folder = tmp_path / "dense" / "model"
    edit_json(folder / "config.json", id2label={"0": "LABEL_0"})
    run(flags, tmp_path / "taught", method="dense", teacher=folder)
