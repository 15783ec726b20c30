"""A mistake of the user ends with status 2 and one clear line; nothing is left half-written."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import eval as evaluation
import train
from data import get_task
from kinds.classify import Classify
from support.terminal import UserError


@pytest.fixture
def case(tiny, tmp_path):
    """A copy of the tiny model and task that a test may spoil, and its flags."""
    source = Path(tiny[1]).parent
    for name in ("train.tsv", "dev.tsv", "task.json"):
        shutil.copy(source / name, tmp_path / name)
    shutil.copytree(source / "model", tmp_path / "model")
    flags = [flag.replace(str(source), str(tmp_path)) for flag in tiny]
    return tmp_path, flags


def refused(capsys, argv, *words, main=train.main):
    """Assert that the command ends with status 2 and one error line that holds all `words`."""
    capsys.readouterr()
    assert main([str(flag) for flag in argv]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: "), line
    assert line.count("\n") == 1, line
    assert len(line) < 600, line
    for word in words:
        assert str(word) in line, (word, line)


def refused_file(read, content, *words, **options):
    """Assert that `read` refuses the content of FILE in one line that holds all `words`."""
    with pytest.raises(UserError) as caught:
        read(content, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("FILE")
    assert len(message) < 600, message
    for word in words:
        assert word in message, message


def contents(folder):
    """The bytes of each file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path, **changes):
    """Change or add top-level entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path, change):
    """Change the tensors of a safetensors file by `change(tensors)`."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--densty 0.1", ["--densty"]),
        ("--dens 0.1", ["--dens"]),  # no abbreviations, because a new flag could change their sense
        ("--task mrcp", ["mrcp", "mrpc"]),
        ("--method smp", ["smp", "smp-s"]),
        ("--density 0", ["--density: 0", "(0, 1]"]),
        ("--density 1.5", ["--density: 1.5", "(0, 1]"]),
        ("--density nan", ["--density: nan", "(0, 1]"]),
        ("--density 0.5 --method dense", ["--density", "dense"]),
        ("--epochs 2", ["--epochs and --max-steps"]),
        ("--max-tokens 100", ["--batch-size and --max-tokens"]),
        ("--method dense --score-lr 0.1", ["--score-lr 0.1", "dense does not use it"]),
        ("--method pins --score-lr 0.1", ["--score-lr 0.1", "pins does not use it"]),
        ("--method pins --reg-lambda 3", ["--reg-lambda 3", "pins does not use it"]),
        ("--method fixed --density 0.7", ["--density 0.7", "fixed does not use it"]),
        ("--method dense --hold 0.1", ["--hold 0.1", "dense does not use it"]),
        ("--score-lr 1e39", ["--score-lr: 1e39", "[0, 1e9]"]),  # more than a float32 can hold
        ("--lr -1", ["--lr: -1", "[0, 1e9]"]),
        ("--epochs 0", ["--epochs: 0", "[1, 1e9]"]),
        ("--max-tokens 100000000000000000000", ["--max-tokens", "[0, 1e9]"]),
        ("--epochs two", ["--epochs", "two"]),
        ("--ramp 0", ["--ramp"]),
        ("--hold 0.5 --ramp 0.6", ["--hold 0.5", "--ramp 0.6"]),
        ("--regression logit", ["--regression logit", "no label word gives a number of pairs"]),
        ("--pattern 4:2", ["--pattern 4:2", "0 < n < m"]),
        ("--pattern rows", ["--pattern rows", "weight, unit, head, square blocks as 8x8"]),
        ("--pattern 5x5", ["--pattern 5x5", "a matrix is 32 x 32"]),
        ("--pattern 8x4", ["--pattern 8x4", "square blocks"]),
        ("--pattern 2:4 --density 0.1", ["--density 0.1", "0.5"]),
        ("--pattern 2:5", ["--pattern 2:5", "32"]),  # the model is 32 wide
        ("--pattern head --method pins", ["--pattern head", "pins does not use it"]),
        ("--method pins --pins-score unsigned", ["unsigned", "signed"]),
        ("--method pins --teacher-split 0.6", ["--teacher-split: 0.6", "[0, 0.5]"]),
        ("--method pins --teacher self:nowhere", ["nowhere"]),
        ("--method smp-s --teacher-split 0.1", ["--teacher-split 0.1", "self"]),
        ("--method pins --hold 0 --ramp 1", ["--method pins", "the ramp ends", "smaller ramp"]),
        ("--method smp-l --density 0.0001", ["--method smp-l", "density 0.0001", "0 of 1024"]),
        ("--pattern head --density 0.1", ["--method smp-s", "0 of 4 attention heads"]),
        ("--max-length 33", ["--max-length", "32"]),  # the model has 32 positions
    ],
)
def test_flags(case, capsys, flags, words):
    """A wrong flag is refused by a line that names it and says what was expected."""
    folder, base = case
    flags = flags.split()
    if "--task" in flags:
        base = []
    refused(capsys, [*base, "--out", folder / "out", *flags], *words)
    assert not (folder / "out").exists()


# Each of these functions spoils something in the folder and returns words that the error must hold.


def no_such_folder(folder):
    shutil.rmtree(folder / "model")
    return ["model"]


def truncated(folder):
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return [path]


def wrong_shape(folder):
    def change(tensors):
        tensors[QUERY] = torch.zeros(32, 31)

    edit_tensors(folder / "model" / "model.safetensors", change)
    return [QUERY, "(32, 31)", "(32, 32)"]


def missing_tensor(folder):
    def change(tensors):
        del tensors[QUERY]

    edit_tensors(folder / "model" / "model.safetensors", change)
    return [QUERY, "missing"]


def pickled(folder):
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")
    return [folder / "model", "unpickling runs code", "save_pretrained"]


def missing_column(folder):
    path = folder / "train.tsv"
    lines = path.read_text().split("\n")
    lines[41] = "\t".join(lines[41].split("\t")[:2])
    path.write_text("\n".join(lines))
    return [f"{path}:42:", '"label" is missing']


def unknown_label(folder):
    path = folder / "dev.tsv"
    lines = path.read_text().split("\n")
    lines[8] = "\t".join([*lines[8].split("\t")[:2], "maybe"])
    path.write_text("\n".join(lines))
    return [f"{path}:9:", "maybe", "no or yes"]


def large_tokenizer(folder):
    path = folder / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save(str(path))
    return [path, 121, 120]


def long_label_word(folder):
    edit_json(folder / "task.json", words=["no", "yes w1"])
    return ["yes w1", "one token"]


def unknown_label_word(folder):
    edit_json(folder / "task.json", words=["no", "oui"])
    return ["oui", "one token"]


@pytest.mark.parametrize(
    "spoil",
    [
        no_such_folder,
        truncated,
        wrong_shape,
        missing_tensor,
        pickled,
        missing_column,
        unknown_label,
        large_tokenizer,
        long_label_word,
        unknown_label_word,
    ],
)
def test_files(case, capsys, monkeypatch, spoil):
    """A missing, damaged or unfit file is refused by a line that names it and what is wrong."""
    folder, flags = case
    words = spoil(folder)
    monkeypatch.chdir(folder)
    refused(capsys, [*flags, "--out", folder / "out"], *words)
    assert not (folder / "out").exists()


def test_a_model_and_a_task(case, capsys, monkeypatch):
    """A model that is not the demo's needs a task, and an official task another model.

    Else all words would be unknown tokens. The default folder of the run would be made here.
    """
    folder, flags = case
    monkeypatch.chdir(folder)
    needed = ("give --task or --task-file", folder / "model")
    for more in ([], ["--method", "dense"]):
        refused(capsys, ["--model", folder / "model", *more], *needed)
    for more in ([], ["--model", "demo"], ["--dry-run"]):
        refused(capsys, ["--task", "cola", *more], "--task cola", "give --model")
    assert not (folder / "runs").exists()


def test_a_task_and_a_task_file(case, capsys):
    """--task and --task-file go together only where they name the same task."""
    folder, flags = case
    argv = [*flags, "--out", folder / "out"]
    refused(capsys, [*argv, "--task", "cola"], "--task cola", "task.json", "pairs")
    assert train.main([str(flag) for flag in [*argv, "--task", "pairs", "--dry-run"]]) == 0


def test_unreachable_hub(case, capsys, monkeypatch):
    """If the Hugging Face hub cannot be reached, the error names the model and the hub."""
    import huggingface_hub.constants

    folder, flags = case
    with socket.socket() as closed:  # bound to a port, but it does not listen
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
        argv = [*flags, "--model", "org/name", "--out", folder / "out"]
        refused(capsys, argv, "org/name", "hub")
    assert not (folder / "out").exists()


def test_teacher_of_another_task_or_label_order(case, capsys):
    """A teacher is refused if it is missing, of another task, or of another label order."""
    folder, flags = case
    teacher = str(folder / "teacher")
    dense = [*flags, "--method", "dense", "--max-steps", "1", "--out", teacher]
    assert train.main(dense) == 0
    path = folder / "task.json"
    task = json.loads(path.read_text())
    student = [*flags, "--teacher", teacher, "--out", folder / "out"]
    path.write_text(json.dumps(task | {"labels": ["yes", "no"], "words": ["yes", "no"]}))
    refused(capsys, student, "teacher", "['no', 'yes']", "['yes', 'no']")
    path.write_text(json.dumps(task | {"name": "other"}))
    refused(capsys, student, "teacher", "pairs", "other")
    refused(capsys, [*flags, "--teacher", folder / "nobody", "--out", folder / "out"], "nobody")
    assert not (folder / "out").exists()


def test_out_holds_another_run(case, capsys):
    """A run is not overwritten, and --resume does not continue it with other settings."""
    folder, flags = case
    out = folder / "out"
    flags = [*flags, "--max-steps", "1", "--out", str(out)]
    assert train.main(flags) == 0
    before = contents(out)
    refused(capsys, flags, "out", "--resume")
    refused(capsys, [*flags, "--resume", "--seed", "5"], "--seed 5", "started with 0")
    refused(capsys, ["--out", folder / "typo", "--resume"], folder / "typo", "is no run")
    assert contents(out) == before


def test_damaged_checkpoint(case, capsys):
    """A run cannot be resumed from a truncated checkpoint; the error names the file."""
    folder, flags = case
    out = folder / "out"
    assert train.main([*flags, "--max-steps", "2", "--out", str(out)]) == 0
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refused(capsys, ["--out", out, "--resume"], path)


def test_loss_turns_nan(case, capsys, monkeypatch):
    """A run stops at the step whose loss is NaN, names the step, and keeps its last checkpoint.

    When the cause is gone, the run can be resumed from there.
    """
    folder, flags = case
    out = folder / "out"
    losses = Classify.losses
    calls = []

    def poisoned(*args):
        calls.append(args)
        factor = float("nan") if len(calls) == 6 else 1.0
        return losses(*args) * factor

    argv = [*flags, "--eval-every", "2", "--log-every", "100", "--max-steps", "9", "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(Classify, "losses", poisoned)
        refused(capsys, argv, "step 5", "--reg-lambda", out)
    assert not (out / "result.json").exists()
    assert train.main(["--out", str(out), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "resumed" in said
    assert "at step 4" in said


def test_eval_refuses(case, capsys):
    """eval.py refuses a folder without a run, and a split, task or device that it does not know."""
    folder, flags = case
    refused(capsys, [folder / "none"], "none", main=evaluation.main)
    assert train.main([*flags, "--max-steps", "1", "--out", str(folder / "out")]) == 0
    argv = [folder / "out", "--predictions", folder / "p.tsv"]
    refused(capsys, [*argv, "--split", "test"], "test", "train, dev", main=evaluation.main)
    refused(capsys, [*argv, "--task", "ax"], "ax", "pairs", main=evaluation.main)
    refused(capsys, [folder / "out", "--device", "tpu"], "tpu", main=evaluation.main)
    assert not (folder / "p.tsv").exists()
    loaded = (None, get_task("ax"), None, {"max_length": 8})  # a task without a dev set
    with pytest.raises(UserError, match="ax: no split has labels; give --predictions"):
        evaluation.report("RUN", loaded, "model", None, folder)
