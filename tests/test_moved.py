"""What a run remembers of its model, data and task: checked on resume, and enough to use it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_errors import edit_json, refused
from test_train import interrupted_at, result_of, rows, run, same

import eval as evaluation
import prune
import train
from data import get_task
from models.runs import load_run, read_run_config
from support.fetch import locate
from support.terminal import UserError
from tools import deploy, report

ROOT = Path(train.__file__).parent
OPTIONS = ["--eval-every", "5", "--dropout", "0", "--seed", "3"]


def half(argv, out):
    """Interrupt a run after step 7."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune.SMPShared, "update", interrupted_at(7, prune.SMPShared.update))
        assert train.main([str(flag) for flag in [*argv, "--out", out]]) == 143


@pytest.fixture
def place(tiny, tmp_path):
    """A folder of the user with a model, a task and its data, and the flags of a run there."""
    folder = tmp_path / "user"
    shutil.copytree(tiny[1], folder / "model")
    for name in ("train.tsv", "dev.tsv", "task.json"):
        shutil.copy(Path(tiny[3]).parent / name, folder / name)
    edit_json(folder / "task.json", test="dev.tsv")
    return folder


def flags_in(place, tiny):
    own = ["--model", place / "model", "--task-file", place / "task.json"]
    return [str(flag) for flag in [*own, "--data-dir", place / "data", *tiny[6:], *OPTIONS]]


CHANGES = {
    "sha256_of_model": lambda place: change_model(place / "model" / "model.safetensors"),
    "config_layer_norm_eps": lambda place: edit_json(
        place / "model" / "config.json", layer_norm_eps=0.1
    ),
    "sha256_of_tokens": lambda place: change_tokens(place / "model" / "tokenizer.json"),
    "sha256_of_train": lambda place: append(place / "train.tsv"),
    "sha256_of_dev": lambda place: append(place / "dev.tsv"),
    "task_words": lambda place: edit_json(place / "task.json", words=["yes", "no"]),
    "task_metrics": lambda place: edit_json(place / "task.json", metric="f1"),
}


def change_model(path):
    state = load_file(path)
    state["bert.embeddings.LayerNorm.bias"] += 1
    save_file(state, path)


def change_tokens(path):
    says = json.loads(path.read_text())
    words = says["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    path.write_text(json.dumps(says))


def append(path):
    path.write_text(path.read_text() + "w1\tw2\tno\n")


@pytest.mark.parametrize("name", CHANGES)
def test_resume_compares(name, place, tiny, tmp_path, capsys):
    """A run does not go on with another model, other data or another task; the change is named."""
    out = tmp_path / "run"
    half(flags_in(place, tiny), out)
    before = (out / "checkpoint.safetensors").read_bytes()
    CHANGES[name](place)
    refused(capsys, [*flags_in(place, tiny), "--out", out, "--resume"], name, "but was")
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_resume_from_another_place(place, tiny, tmp_path, monkeypatch):
    """Model, task and data may lie elsewhere, also below another current folder."""
    run(flags_in(place, tiny), tmp_path / "whole")
    monkeypatch.chdir(place)
    own = ["--model", "model", "--task-file", "task.json", "--data-dir", "data"]
    half([*own, *tiny[6:], *OPTIONS], "run")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a"
    shutil.copytree(place / "run", out)
    assert train.main(["--out", str(out), "--resume"]) == 0  # config.json knows the places
    same(tmp_path / "whole", out)
    moved = tmp_path / "moved"
    shutil.move(place, moved)
    argv = ["--out", str(moved / "run"), "--resume", "--model", str(moved / "model")]
    assert train.main([*argv, "--data-dir", str(moved)]) == 0
    same(tmp_path / "whole", moved / "run")


def test_an_older_run_is_resumed(place, tiny, tmp_path):
    """A run folder that does not say what it began with is resumed, as it was."""
    out = tmp_path / "run"
    half(flags_in(place, tiny), out)
    config = json.loads((out / "config.json").read_text())
    del config["began_with"], config["source"], config["settings"]["patience"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "task.json").unlink()
    assert train.main(["--out", str(out), "--resume"]) == 0


def test_a_run_folder_is_enough(place, tiny, tmp_path, capsys):
    """Without model, task file and data a run still labels texts, exports, and packs its mask."""
    out = tmp_path / "run"
    run(flags_in(place, tiny), out, max_steps=2)
    shutil.copy(place / "dev.tsv", tmp_path / "mine.tsv")
    shutil.copytree(place, tmp_path / "elsewhere")
    shutil.rmtree(place)
    assert evaluation.main([str(out), "--input", str(tmp_path / "mine.tsv")]) == 0
    assert deploy.main(["export", str(out), str(tmp_path / "export")]) == 0
    assert deploy.main(["save-mask", str(out), str(tmp_path / "mask")]) == 0
    argv = ["compact", str(out), str(tmp_path / "compact"), "--no-check"]
    assert deploy.main(argv) == 0
    refused(capsys, [out], "dev.tsv: no such file", "--data-dir", main=evaluation.main)
    moved = str(tmp_path / "elsewhere")
    accuracy = f"{100 * result_of(out)['metrics']['accuracy']:.2f}"
    task = ["--task-file", f"{moved}/task.json"]
    for where in (["--data-dir", moved], task, [*task, "--split", "test"]):
        capsys.readouterr()
        assert evaluation.main([str(out), *where]) == 0
        assert f"accuracy          {accuracy}" in capsys.readouterr().out
    argv = ["evaluate", str(tmp_path / "compact"), "--data-dir", moved]
    assert deploy.main(argv) == 0
    assert f"accuracy {accuracy}" in capsys.readouterr().out
    argv = [str(out), "--density", "0.5", "--data-dir", moved]
    assert report.main([*argv, "--model", f"{moved}/model"]) == 0


def test_files_that_have_moved(place, tmp_path, capsys):
    """One that is found elsewhere is named; a name that two splits share finds neither."""
    task = get_task(None, str(place / "task.json"))
    (place / "train.tsv").rename(tmp_path / "train.tsv")
    for _ in range(2):
        assert locate(task, "train", tmp_path) == tmp_path / "train.tsv"
    found = f"train.tsv: no such file; {tmp_path / 'train.tsv'} is taken in its place\n"
    assert capsys.readouterr().err.count(found) == 1
    task.files["dev"] = str(place / "dev" / "train.tsv")
    for split in ("train", "dev"):
        with pytest.raises(UserError, match="train.tsv: no such file"):
            locate(task, split, tmp_path)


def test_a_tag_run_knows_its_tags(kinds, tiny, tmp_path):
    """The tags of a training file are in the run folder, so the file is not needed any more."""
    folder = tmp_path / "tags"
    folder.mkdir()
    for name in ("train.txt", "dev.txt", "tag.json"):
        shutil.copy(Path(kinds["tag"]).parent / name, folder / name)
    out = tmp_path / "run"
    run([*tiny, "--task-file", str(folder / "tag.json")], out, method="dense", max_steps=2)
    shutil.rmtree(folder)
    _, task, _, _ = load_run(out)
    assert task.labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    (tmp_path / "mine.tsv").write_text("sentence\nw1 w2\n\nw3\n")
    assert evaluation.main([str(out), "--input", str(tmp_path / "mine.tsv")]) == 0


def test_a_labelled_test_split(place, tiny, tmp_path, capsys):
    """`--split test` prints metrics where labels are, and names what is missing where not."""
    out = tmp_path / "run"
    run(flags_in(place, tiny), out, max_steps=2)
    capsys.readouterr()
    assert evaluation.main([str(out), "--split", "test"]) == 0
    said = capsys.readouterr().out
    assert "on pairs test" in said
    assert f"accuracy          {100 * result_of(out)['metrics']['accuracy']:.2f}" in said
    (place / "bare.tsv").write_text("a\tb\nw1\tw2\n")
    edit_json(place / "task.json", test="bare.tsv")
    argv = [out, "--split", "test", "--task-file", place / "task.json"]
    refused(capsys, argv, "bare.tsv", 'no column "label"', main=evaluation.main)
    written = str(tmp_path / "p.tsv")
    assert evaluation.main([str(flag) for flag in [*argv, "--predictions", written]]) == 0


def test_tools_run_from_any_folder(tmp_path):
    """A program of tools/ is started by its path, whatever the current folder is.

    One of them is started. The others have the same line before they import anything of ours.
    """
    command = [sys.executable, str(ROOT / "tools" / "deploy.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"
    programs = 0
    for path in (ROOT / "tools").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            programs += 1
            assert 0 < text.find(line) < text.find("support.terminal"), path
    assert programs == 8
    names = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert not names & {*sys.stdlib_module_names, "torch", "numpy", "tokenizers", "tqdm"}


def test_patience(tiny, tmp_path, capsys):
    """A run stops after so many evaluations at the final density without a new best.

    An interrupted one stops at the same step, and resuming a stopped one changes nothing.
    """
    flags = [*tiny, "--eval-every", "2", "--patience", "2", "--lr", "0", "--density", "0.9"]
    flags += ["--score-lr", "0", "--reg-lambda", "0", "--ramp", "0.1"]
    result = run(flags, tmp_path / "a")
    assert 7 < result["steps"] < 26
    evaluations = [row["step"] for row in rows(tmp_path / "a") if "metrics" in row]
    assert evaluations[-1] == result["best"]["step"] + 4 == result["steps"]
    assert "without a new best" in capsys.readouterr().out
    half(flags, tmp_path / "b")
    for name in ("a", "b"):
        assert train.main(["--out", str(tmp_path / name), "--resume"]) == 0
        assert result_of(tmp_path / name)["steps"] == result["steps"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder where nobody can write")
def test_a_read_only_current_folder(place, tiny, tmp_path, monkeypatch):
    """Nothing is made in the current folder that is not needed there."""
    monkeypatch.chdir("/proc")
    monkeypatch.setenv("NANOPRUNE_CACHE", str(tmp_path / "cache"))
    own = ["--model", str(place / "model"), "--task-file", str(place / "task.json")]
    run([*own, *tiny[6:]], tmp_path / "run", max_steps=1)
    assert list((tmp_path / "cache" / "tokens").glob("pairs-*"))
    assert evaluation.main([str(tmp_path / "run")]) == 0


def test_what_config_says(place, tiny, tmp_path):
    """config.json has the sha256 of the weights and of each split, and task.json whole paths."""
    out = tmp_path / "run"
    run(flags_in(place, tiny), out, max_steps=2)
    began = read_run_config(out)["began_with"]
    assert {"sha256_of_model", "sha256_of_train", "sha256_of_dev", "task_labels"} <= began.keys()
    task = json.loads((out / "task.json").read_text())
    assert task["train"] == str(place / "train.tsv")
    assert task["labels"] == ["no", "yes"]
