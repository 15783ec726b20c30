"""No command destroys what is there, and whatever stops a command ends it in one line."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_errors import contents, edit_json, refused

import data
import eval as evaluation
import train
from conftest import GOLDEN
from support import fetch, files, machine
from support.tensors import as_safetensors, parse_safetensors
from support.terminal import UserError, show
from tools import deploy, pictures, report
from tools import masks as mask_files
from tools.record import read_record

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A folder with two finished runs of a few steps, smp-s and dense."""
    folder = tmp_path_factory.mktemp("made")
    for method in ("smp-s", "dense"):
        flags = ["--method", method, "--max-steps", "4", "--eval-every", "2", "--lr", "1e-3"]
        if method == "smp-s":
            flags += ["--hold", "0", "--ramp", "0.25"]
        assert train.main([*tiny, *flags, "--out", str(folder / method)]) == 0
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the finished SMP-S run that a test may spoil."""
    shutil.copytree(made / "smp-s", tmp_path / "run")
    return tmp_path / "run"


def command(program, *arguments):
    """The words of a command line that starts one of the programs."""
    name = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    return [sys.executable, *name, *[str(argument) for argument in arguments]]


def last_line(text):
    return text.rstrip("\n").split("\n")[-1]


# -------------------------------------------------------------------------------------------------
# the run folder


def test_of_two_runs_in_one_folder_one_is_refused(tiny, tmp_path):
    """Two runs that are started together in one folder: one trains, the other is refused.

    The log has each step once.
    """
    flags = [*tiny, "--max-steps", "40", "--out", str(tmp_path / "run")]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    both = [forks.start(["train", *flags], folder) for folder in folders]
    ends = sorted(forks.results(both))
    assert [status for status, _, _ in ends] == [0, 2], ends
    _, _, err = ends[1]
    assert "another process trains there" in err or "not empty" in err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))


def test_a_run_is_resumed_by_one_process_only(tiny, made, capsys):
    """While one process trains in a folder, another one cannot resume its run."""
    out = made / "smp-s"
    before = contents(out)
    settings = train.Settings(out=str(out), resume=True)
    with train.claimed(out, settings.resume, False):
        refused(capsys, ["--out", out, "--resume"], out, "another process trains there")
    assert contents(out) == before
    assert train.main(["--out", str(out), "--resume"]) == 0


def test_a_refused_run_leaves_nothing(tiny, tmp_path, capsys):
    """A run that cannot start leaves no folder, and adds nothing to a folder of other things."""
    flags = [*tiny, "--max-length", "99"]
    refused(capsys, [*flags, "--out", tmp_path / "new"], "--max-length 99")
    assert not (tmp_path / "new").exists()
    (tmp_path / "letter.txt").write_text("Dear ...")
    (tmp_path / ".letter.0a1b2c3d.tmp").write_text("Dear")
    os.utime(tmp_path / ".letter.0a1b2c3d.tmp", (0, 0))
    before = contents(tmp_path)
    for flags in ([], ["--resume"]):
        refused(capsys, [*tiny, *flags, "--out", tmp_path], "not empty", "--resume")
    assert contents(tmp_path) == before


def test_a_world_size_without_torchrun(tiny, tmp_path, monkeypatch, capsys):
    """WORLD_SIZE alone, left in the environment by something else, is refused in one line."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, [*tiny, "--out", tmp_path / "run"], "WORLD_SIZE is set", "torchrun")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "3")  # means nothing for one process
    assert train.main([*tiny, "--max-steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_the_demo_makes_room_for_itself_only(tmp_path, monkeypatch, capsys):
    """The demo replaces an earlier demo, and not a run that somebody else put there.

    Of an earlier demo it deletes only what the demo wrote.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "loop", lambda run, signals: None)
    monkeypatch.setattr(train, "finish", lambda run: train.write_json(run.out / "result.json", {}))
    assert train.main([]) == 0
    (tmp_path / "runs/demo/dense/notes.txt").write_text("mine")
    (tmp_path / "runs/demo/dense/checkpoint.safetensors").write_text("old")
    assert train.main([]) == 0
    assert not (tmp_path / "runs/demo/dense/checkpoint.safetensors").exists()
    assert (tmp_path / "runs/demo/dense/notes.txt").read_text() == "mine"
    edit_json(tmp_path / "runs/demo/dense/config.json", command="python train.py --seed 1")
    before = contents(tmp_path)
    refused(capsys, [], "runs/demo/dense", "move it away")
    assert contents(tmp_path) == before


def test_temporary_files_of_killed_processes_go(tiny, run):
    """What a killed process left is removed at the next start; what a living one writes is not."""
    dead = [run / ".result.json.0a1b2c3d.tmp", run / "best" / ".config.json.00000000.tmp"]
    alive = run / ".result.json.11111111.tmp"
    for path in (*dead, alive):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 60,) * 2)
    with open(alive, "ab") as file:
        assert files.lock(file) == "ours"
        assert train.main(["--out", str(run), "--resume"]) == 0
    assert not any(path.exists() for path in dead)
    assert alive.exists()
    files.atomic_write(run / "result.json", "{}")  # elsewhere, the next writer of the file does it
    assert not alive.exists()


def test_a_temporary_file_that_is_gone_does_not_come_back(tmp_path):
    """Between the search for temporary files and the look at one its writer may have renamed it."""
    files.sweep([tmp_path / ".file.0a1b2c3d.tmp"])
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_resumed_by_its_own_command(tiny, tmp_path, capsys):
    """With --resume added, the command of a run continues it. So does --out with one of its flags.

    Flags are compared with the settings of the run, and not with a recipe.
    """
    out = tmp_path / "run"
    flags = ["--method", "pins", "--teacher-split", "0.2", "--hold", "0.3", "--ramp", "0.4"]
    flags += ["--task", "pairs", "--pins-window", "1", "--max-steps", "9"]
    argv = [*tiny, *flags, "--out", str(out)]
    assert train.main(argv) == 0
    assert train.main([*argv, "--resume"]) == 0
    for flags in (["--teacher-split", "0.2"], ["--hold", "0.3"], ["--method", "pins"]):
        assert train.main(["--out", str(out), "--resume", *flags]) == 0
    refused(capsys, ["--out", out, "--resume", "--hold", "0.2"], "--hold 0.2", "started with 0.3")


def test_git_that_hangs_does_not_stop_a_run(monkeypatch):
    """The version of the code is asked for with a limit of time, and may stay unknown."""

    def hang(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(machine.subprocess, "run", hang)
    assert machine.git_commit() is None


# -------------------------------------------------------------------------------------------------
# outputs


@pytest.mark.parametrize(
    "main, argv",
    [
        (train.main, ["--out", ""]),
        (train.main, ["--model="]),
        (train.main, ["--task-file", ""]),
        (train.main, ["--data-dir", ""]),
        (train.main, ["--teacher", ""]),
        (evaluation.main, [""]),
        (evaluation.main, ["RUN", "--predictions", ""]),
        (evaluation.main, ["RUN", "--data-dir", ""]),
        (data.main, ["--task", "demo", "--data-dir", ""]),
        (data.main, ["--task-file", ""]),
        (deploy.main, ["export", "RUN", ""]),
        (deploy.main, ["save-mask", "RUN", ""]),
        (deploy.main, ["masks", "", "FILE"]),
        (deploy.main, ["masks", "BASE", "FILE", ""]),
        (report.main, ["RUN", "--plot", ""]),
    ],
)
def test_empty_paths(main, argv, tmp_path, monkeypatch, capsys):
    """An empty path is refused, and nothing is written into the current folder."""
    monkeypatch.chdir(tmp_path)
    refused(capsys, argv, "is empty", main=main)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["export", "compact", "save-mask"])
def test_what_is_there_is_not_written_over(name, tiny, run, tmp_path, capsys):
    """What exists is written over with --force only, and the folders of the run not even then."""
    target = tmp_path / "target"
    target.mkdir()
    argv = [name, run, target]
    if name == "compact":
        argv += ["--data-dir", tiny[5], "--device", "cpu"]
    if name == "save-mask":
        target = target / "mask"
        argv[2] = target
    else:
        assert deploy.main([str(word) for word in argv]) == 0  # an empty folder is free
        shutil.rmtree(target)
        target.mkdir()
    (tmp_path / "target" / "mask").write_text("precious")
    another = tmp_path / "another"
    shutil.copytree(run, another)
    before = contents(tmp_path)
    refused(capsys, argv, target, "--force", main=deploy.main)
    for own in (run, run / "model", run / "best" / "new", run / "model" / "model.safetensors"):
        argv[2] = own
        refused(capsys, [*argv, "--force"], own, "belongs to the run", main=deploy.main)
    for own in (another, another / "model", another / "new"):
        argv[2] = own
        refused(capsys, [*argv, "--force"], own, "is a run, or lies in one", main=deploy.main)
    assert contents(tmp_path) == before
    argv[2] = target
    assert deploy.main([*[str(word) for word in argv], "--force"]) == 0
    assert contents(tmp_path) != before
    if name != "save-mask":
        argv[0] = {"export": "compact", "compact": "export"}[name]
        before = contents(tmp_path)
        refused(capsys, [*argv[:3], "--force"], target, "of another layout", main=deploy.main)
        assert contents(tmp_path) == before


def test_predictions_replace_predictions_only(tiny, made, tmp_path, capsys):
    """--predictions replaces a file of predictions, and no other file."""
    argv = [made / "smp-s", "--split", "dev", "--data-dir", tiny[5], "--predictions"]
    target = tmp_path / "p.tsv"
    for _ in range(2):
        assert evaluation.main([str(word) for word in [*argv, target]]) == 0
    target.write_text("a\tb\nmy text\tmore text\n")
    before = contents(tmp_path)
    refused(capsys, [*argv, target], target, "is there already", main=evaluation.main)
    assert contents(tmp_path) == before


def test_predictions_into_a_pipe_and_through_a_link(tiny, made, tmp_path, capsys):
    """A named pipe gets the predictions and stays a pipe. A link stays a link to the file."""
    argv = [str(made / "smp-s"), "--split", "dev", "--data-dir", tiny[5], "--predictions"]
    target = tmp_path / "file.tsv"
    assert evaluation.main([*argv, str(target)]) == 0
    expected = target.read_bytes()
    assert expected.count(b"\n") == 61

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert evaluation.main([*argv, str(pipe)]) == 0
    reader.join(timeout=20)
    assert received == [expected]
    assert pipe.is_fifo()

    target.write_text("")
    link = tmp_path / "link"
    link.symlink_to(target)
    assert evaluation.main([*argv, str(link)]) == 0
    assert link.is_symlink()
    assert target.read_bytes() == expected


def test_predictions_to_standard_output(tiny, made, tmp_path):
    """/dev/stdout gets the predictions and nothing else; what others write there stays whole."""
    argv = ["eval", made / "smp-s", "--split", "dev", "--data-dir", tiny[5]]
    log = tmp_path / "log"
    with open(log, "w") as file:
        subprocess.run(["echo", "before"], stdout=file, check=True)
        assert forks.Fork([*argv, "--predictions", "/dev/stdout"], stdout=file).wait() == 0
        subprocess.run(["echo", "after"], stdout=file, check=True)
    first, header, *rows, last = log.read_text().splitlines()
    assert (first, header, last) == ("before", "index\tprediction", "after")
    assert len(rows) == 60


def test_a_data_folder_is_not_created(made, tmp_path, monkeypatch, capsys):
    """eval and tools do not create a --data-dir; where they need one, they say that it is missing.

    A task file names its own files. It needs no data folder, and its tokens are kept elsewhere.
    """
    monkeypatch.setenv("NANOPRUNE_CACHE", str(tmp_path / "cache"))
    typo = tmp_path / "typo"
    assert evaluation.main([str(made / "dense"), "--data-dir", str(typo)]) == 0
    assert report.main([str(made / "smp-s"), "--density", "0.5", "--data-dir", str(typo)]) == 0
    monkeypatch.setenv("GLUE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"--data-dir {typo}: no such folder"):
        fetch.locate(data.get_task("cola"), "dev", typo)
    assert not typo.exists()


# -------------------------------------------------------------------------------------------------
# how a command ends


def test_what_cannot_be_written_is_one_line(tiny, made, tmp_path, capsys):
    """A full disk, a folder in place of a file, a file in place of a folder: one line, status 2."""
    argv = [made / "smp-s", "--split", "dev", "--data-dir", tiny[5], "--predictions"]
    (tmp_path / "file").write_text("")
    paths = {tmp_path: "directory", tmp_path / "file" / "below": "file"}
    if Path("/dev/full").exists():
        paths[Path("/dev/full")] = "No space left"
    for path, reason in paths.items():
        refused(capsys, [*argv, path], path, reason, main=evaluation.main)
    refused(capsys, [*tiny, "--out", tmp_path / "file"], tmp_path / "file")
    refused(capsys, [made / "smp-s", "--input", tmp_path / "none"], "none", main=evaluation.main)


@pytest.mark.parametrize("module, name", [(evaluation, "load_run"), (data, "prepare")])
def test_ctrl_c_is_one_line(module, name, monkeypatch, capsys):
    """Ctrl-C ends a command with status 130 and the word "interrupted"."""

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, interrupt)
    argv = ["RUN"] if module is evaluation else ["--task", "demo"]
    assert module.main(argv) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("program", ["train.py", "eval.py", "tools.deploy"])
def test_ctrl_c_while_torch_is_loaded(program):
    """Ctrl-C in the first second ends the command without a traceback."""
    here = subprocess.Popen(command(program, "RUN"), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert here.stderr.readline() == "loading torch\n"
    here.send_signal(signal.SIGINT)
    assert here.communicate()[1] == ""
    assert here.returncode == -signal.SIGINT


def test_an_interrupted_run_says_how_it_goes_on(tiny, tmp_path, monkeypatch, capsys):
    """After Ctrl-C the command that is printed continues the run to its end, in its own folder."""
    update = train.METHODS["smp-s"].update

    def interrupt(self, step):
        update(self, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    out = tmp_path / "a run"
    argv = [*tiny, "--max-steps", "4", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(train.METHODS["smp-s"], "update", interrupt)
        assert train.main(argv) == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted at step 2; python train.py --out ")
    words = shlex.split(said.split("; ")[1].split(" goes on")[0])
    assert train.main(words[2:]) == 0
    assert json.loads((out / "result.json").read_text())["steps"] == 4


def test_a_closed_pipe_does_not_kill_a_run(tiny, tmp_path):
    """A run goes on when nothing reads its output any more; a report ends with status 141."""
    out = tmp_path / "run"
    argv = command("train.py", *tiny, "--max-steps", "3", "--out", out)
    run = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    assert run.stdout.readline() == b"loading torch\n"
    run.stdout.close()
    assert run.wait() == 0
    assert (out / "result.json").exists()
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe, open(tmp_path / "err", "w") as err:
        assert forks.Fork(["tools.report", out], stdout=pipe, stderr=err).wait() == 141
    expected = "stopped: nothing reads the output any more"
    assert last_line((tmp_path / "err").read_text()) == expected


# -------------------------------------------------------------------------------------------------
# mask files


def forged(source, target, change):
    """Write the mask file `source` with `change(about, payload)` made, and a valid checksum.

    `change` returns the new bytes.
    """
    about, payload = mask_files.read_mask(source)
    payload = change(about, payload)
    header = {"mask": json.dumps(about), "sha256": mask_files.digest(about, payload)}
    tensors = {"mask": np.frombuffer(payload, np.uint8)}
    target.write_bytes(mask_files.numpy_to_safetensors(tensors, metadata=header))


def bomb(about, payload):
    """The bytes of the first matrix become 200 MB of gaps."""
    packer = zlib.compressobj(9, wbits=-15)
    zeros = packer.compress(bytes(200_000_000)) + packer.flush()
    rest = payload[about["matrices"][0][4] :]
    about["matrices"][0][4] = len(zeros)
    return zeros + rest


def overflow(about, payload):
    about["matrices"][0][1:3] = [2**40, 2**40]
    return payload


def missing_matrix(about, payload):
    return payload[: -about["matrices"].pop()[4]]


def repeated_matrix(about, payload):
    about["matrices"][1][0] = about["matrices"][0][0]
    return payload


def another_shape(about, payload):
    rows, columns = about["matrices"][0][1:3]
    about["matrices"][0][1:3] = [rows // 2, 2 * columns]
    return payload


def negative_count(about, payload):
    about["matrices"][0][3] = -1
    return payload


def too_few_bytes(about, payload):
    about["matrices"][-1][4] += 10
    return payload


def too_many_bytes(about, payload):
    return payload + b"more"


def no_table(about, payload):
    about["matrices"] = [3]
    return payload


def no_length(about, payload):
    del about["max_length"]
    return payload


def long_texts(about, payload):
    about["max_length"] = 10**9
    return payload


def unknown_dtype(about, payload):
    about["dtype"] = "int3"
    return payload


def short_texts(about, payload):
    about["max_length"] = 3
    return payload


def words_of_numbers(about, payload):
    about["words"] = [1, 2]
    return payload


def half_a_character(about, payload):
    about["words"] = ["no", "\ud800"]
    return payload


def swapped_labels(about, payload):
    about["labels"].reverse()
    return payload


def third_word(about, payload):
    about["words"].append("w1")
    return payload


HOSTILE = [
    (bomb, "holds more or less"),
    (overflow, "not those of the base model"),
    (missing_matrix, "not those of the base model"),
    (repeated_matrix, "not those of the base model"),
    (another_shape, "not those of the base model"),
    (negative_count, "keeps -1 weights"),
    (too_few_bytes, "expected"),
    (too_many_bytes, "bytes, expected"),
    (no_table, "not a mask of this base model"),
    (no_length, "no 'max_length'"),
    (long_texts, "texts of 1000000000 tokens"),
    (short_texts, "texts of 3 tokens"),
    (words_of_numbers, "not a whole mask file"),
    (half_a_character, "not a whole mask file"),
    (unknown_dtype, "dtype is 'int3'"),
    (swapped_labels, "['yes', 'no']"),
    (third_word, "3 label words"),
]


@pytest.fixture(scope="module")
def mask(made):
    path = made / "good.mask"
    assert deploy.main(["save-mask", str(made / "smp-s"), str(path)]) == 0
    return path


@pytest.mark.parametrize("change, reason", HOSTILE, ids=[case[0].__name__ for case in HOSTILE])
def test_hostile_mask_files(change, reason, tiny, mask, tmp_path, capsys):
    """A mask file with a valid checksum and wrong content is refused, by a line that says why."""
    path = tmp_path / "bad.mask"
    forged(mask, path, change)
    assert path.stat().st_size < 300_000
    argv = ["masks", tiny[1], path, "--task-file", tiny[3], "--data-dir", tiny[5]]
    refused(capsys, argv, path, reason, main=deploy.main)


def test_other_files_as_masks(tiny, run, tmp_path, capsys):
    """Files that are no masks are refused: deep JSON, an empty .npy, a .npy that claims 100 TB.

    A run without masks in its scores has no mask to save.
    """
    flags = ["--task-file", tiny[3], "--data-dir", tiny[5]]
    path = tmp_path / "deep.mask"
    tensors = {"mask": np.zeros(1, np.uint8)}
    header = {"mask": "[" * 100_000, "sha256": ""}
    path.write_bytes(mask_files.numpy_to_safetensors(tensors, metadata=header))
    argv = ["masks", tiny[1], path, *flags]
    refused(capsys, argv, path, "not a whole mask file", main=deploy.main)
    path = tmp_path / "empty.npy"
    path.write_bytes(b"")
    argv = ["masks", tiny[1], path, *flags, "--task", "pairs"]
    refused(capsys, argv, path, "not a .npy of packed bits", main=deploy.main)
    with open(path, "wb") as file:
        about = {"descr": "|u1", "fortran_order": False, "shape": (10**14,)}
        np.lib.format.write_array_header_1_0(file, about)
    refused(capsys, argv, path, "not a .npy of packed bits", main=deploy.main)
    scores = load_file(run / "scores.safetensors")
    scores = {name: tensor for name, tensor in scores.items() if not name.endswith(".mask")}
    save_file(scores, run / "scores.safetensors")
    argv = ["save-mask", run, tmp_path / "new"]
    refused(capsys, argv, "holds no mask", main=deploy.main)


def test_words_and_task_of_a_mask(tiny, mask, tmp_path, capsys):
    """--words are as many as the classes, and --task does not contradict the mask file."""
    argv = ["masks", tiny[1], mask, "--data-dir", tiny[5]]
    own = [*argv, "--task-file", tiny[3]]
    refused(capsys, [*own, "--words", "no", "yes", "w1"], "3 label words", main=deploy.main)
    refused(capsys, [*own, "--words", "no"], "1 label words", main=deploy.main)
    refused(capsys, [*argv, "--task", "demo"], "--task demo", "pairs", main=deploy.main)
    refused(capsys, [*own, "--task", "rte"], "--task rte", "pairs", main=deploy.main)


def test_the_mask_of_the_best_checkpoint(tiny, run, mask, tmp_path, capsys):
    """save-mask --best saves the mask of best/. A run without it is refused in one line."""
    best = json.loads((run / "result.json").read_text())["best"]
    scores = load_file(run / "best" / "scores.safetensors")
    other = {name: ~t if name.endswith(".mask") else t for name, t in scores.items()}
    save_file(other, run / "best" / "scores.safetensors")  # so that it differs from the last step
    path = tmp_path / "best.mask"
    assert deploy.main(["save-mask", str(run), str(path), "--best"]) == 0
    about, payload = mask_files.read_mask(path)
    shapes = {name: (rows, columns) for name, rows, columns, _, _ in about["matrices"]}
    for name, found in mask_files.unpack_all(path, about["matrices"], payload, shapes).items():
        assert np.array_equal(found, other[f"{name}.mask"].numpy())
    save_file(scores, run / "best" / "scores.safetensors")
    flags = ["--task-file", tiny[3], "--data-dir", tiny[5]]
    assert deploy.main(["save-mask", str(run), str(path), "--best", "--force"]) == 0
    assert deploy.main(["masks", tiny[1], str(path), *flags]) == 0
    assert show(best["metrics"]) in capsys.readouterr().out
    (run / "best" / "scores.safetensors").unlink()
    argv = ["save-mask", run, tmp_path / "no.mask", "--best"]
    refused(capsys, argv, "best/scores.safetensors", main=deploy.main)


def test_labels_of_a_compact_folder(tiny, made, tmp_path, capsys):
    """A compact folder is refused for a task whose labels have another order."""
    folder = tmp_path / "compact"
    argv = ["compact", str(made / "dense"), str(folder), "--no-check"]
    assert deploy.main(argv) == 0
    about = json.loads((folder / "compact.json").read_text())
    edit_json(folder / "compact.json", labels=about["labels"][::-1])
    argv = ["evaluate", folder, "--data-dir", tiny[5]]
    refused(capsys, argv, "['yes', 'no']", "['no', 'yes']", main=deploy.main)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"labels": None}, "the task file describes"),
        ({"words": [10**6, 6]}, "has no words"),
        ({"words": [-1, 6]}, "has no words"),
        ({"settings": {}}, "not the settings of a run"),
        ({"settings": {"method": []}}, "not the settings of a run"),
        ({"settings": None}, "not the settings of a run"),
    ],
)
def test_a_wrong_config_of_a_run(run, tiny, changes, reason, capsys):
    """A config.json that lacks something, or has values that cannot be, is refused in one line."""
    edit_json(run / "config.json", **changes)
    refused(capsys, [run, "--data-dir", tiny[5]], run, reason, main=evaluation.main)


def test_what_is_no_run_folder(tmp_path, capsys):
    """A folder without config.json, and a file, are refused with what to give instead."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    for place in (tmp_path, path):
        refused(capsys, [place], place, "give the folder of a run", main=evaluation.main)


def test_a_file_of_brackets(tmp_path, capsys):
    """JSON that is nested too deeply is refused like any other unreadable JSON."""
    path = tmp_path / "task.json"
    path.write_text("[" * 100_000)
    refused(capsys, ["--task-file", path], path, "not a readable JSON object")


# -------------------------------------------------------------------------------------------------
# reports over many runs


def test_a_report_leaves_out_what_is_no_run(made, tmp_path, capsys):
    """A table survives folders without a whole run: each is left out with one line.

    A run that is named twice counts once. A folder of runs stands for the runs in it.
    """
    spoil = {
        "empty": lambda run: (run / "result.json").write_text(""),
        "partial": lambda run: (run / "result.json").write_text('{"task": "pairs"}'),
        "a list": lambda run: (run / "result.json").write_text("[]"),
        "a density of letters": lambda run: edit_json(run / "result.json", density="0.1"),
        "no best": lambda run: edit_json(run / "result.json", best=None),
        "no metrics": lambda run: edit_json(run / "result.json", metrics={}),
        "no settings": lambda run: (run / "config.json").write_text("{}"),
        "no config": lambda run: (run / "config.json").unlink(),
        "unfinished": lambda run: (run / "result.json").unlink(),
    }
    for name, change in spoil.items():
        shutil.copytree(made / "smp-s", tmp_path / name)
        change(tmp_path / name)
    (tmp_path / "nothing").mkdir()
    older = tmp_path / "older"
    shutil.copytree(made / "smp-s", older)
    config = json.loads((older / "config.json").read_text())
    for name in ("pattern", "redistribute", "pins_score"):
        del config["settings"][name]
    (older / "config.json").write_text(json.dumps(config))
    twice = [made, made / "smp-s", f"{made}/./smp-s"]
    capsys.readouterr()
    argv = [*[tmp_path / name for name in spoil], tmp_path / "nothing", *twice, older]
    assert report.main([str(path) for path in argv]) == 0
    out, err = capsys.readouterr()
    cells = [line.split(" | ") for line in out.splitlines()[2:]]
    assert [(row[1], row[4]) for row in cells] == [("dense", "1"), ("smp-s", "2")]
    left_out = err.splitlines()
    assert len(left_out) == len(spoil) + 2
    assert all(line.startswith("left out: ") for line in left_out[:-1])
    assert "2 runs share a row, but have 1 seeds" in left_out[-1]


def test_a_torn_line_of_a_log(run, capsys):
    """A torn or foreign line of metrics.jsonl is left out of the curves, and named."""
    rows = pictures.read_log(run)
    with open(run / "metrics.jsonl", "ab") as log:
        log.write(b'[3]\n{"step": "x"}\n{"step": 3, "metrics": null}\n{"step": 9, "los')
    assert pictures.read_log(run) == rows
    assert capsys.readouterr().err.count("left out, not a row of a log") == 4
    for line in ("5", "{}", '{"step": "x"}'):  # resuming drops them
        with open(run / "metrics.jsonl", "w") as log:
            log.write(f'{{"step": 0}}\n{line}\n')
        assert train.main(["--out", str(run), "--resume"]) == 0
        assert '{"step": 0}' == (run / "metrics.jsonl").read_text().splitlines()[0]


# -------------------------------------------------------------------------------------------------
# contradictions and messages


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--input - --predictions p.tsv", ["--input", "--predictions"]),
        ("--input - --split dev", ["--split", "--input"]),
        ("--input - --metrics all", ["--metrics", "--input"]),
    ],
)
def test_flags_of_eval(made, flags, words, capsys):
    """A flag of eval.py that would do nothing is refused."""
    refused(capsys, [made / "smp-s", *flags.split()], *words, main=evaluation.main)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("compact RUN OUT --drop-rows -5", ["--drop-rows: -5", "[0, 1e9]"]),
        ("export RUN OUT --drop-rows 5", ["unrecognized arguments: --drop-rows"]),
        ("export RUN OUT --uniform", ["unrecognized arguments: --uniform"]),
        ("export RUN OUT --no-check", ["unrecognized arguments: --no-check"]),
        ("export RUN OUT --task cola", ["unrecognized arguments: --task cola"]),
        ("export RUN OUT --compact OUT", ["unrecognized arguments: --compact"]),
        ("sparse RUN --force", ["unrecognized arguments: --force"]),
        ("sparse RUN --device cpu", ["unrecognized arguments: --device"]),
        ("save-mask RUN OUT --drop-rows 5", ["unrecognized arguments: --drop-rows"]),
        ("evaluate RUN --best", ["unrecognized arguments: --best"]),
        ("evaluate RUN --split dev", ["unrecognized arguments: --split"]),
        ("predict RUN OUT --force", ["unrecognized arguments: --force"]),
        ("masks BASE RUN --best", ["unrecognized arguments: --best"]),
        ("masks BASE", ["required: FILE"]),
        ("export RUN", ["required: DIR"]),
        ("pack RUN OUT", ["invalid choice: 'pack'"]),
        ("", ["required: COMMAND"]),
        ("evaluate RUN", ["no compact.json"]),
    ],
)
def test_flags_of_deploy(made, flags, words, tmp_path, monkeypatch, capsys):
    """A command of tools.deploy takes its own flags only, and a mistake writes nothing."""
    monkeypatch.chdir(tmp_path)
    argv = [made / "smp-s" if word == "RUN" else word for word in flags.split()]
    refused(capsys, argv, *words, main=deploy.main)
    assert list(tmp_path.iterdir()) == []


def test_best_without_a_plot(made, capsys):
    """A table takes no --best."""
    refused(capsys, [made / "smp-s", "--best"], "--best: only with --plot", main=report.main)


def test_a_lost_checkpoint_says_what_is_left(run, capsys):
    """A damaged checkpoint cannot be downloaded again: the line says that best/ is left."""
    path = run / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    refused(capsys, ["--out", run, "--resume"], path, "cannot be resumed", "best/")


def test_no_size_below_zero(made, capsys):
    """The entropy of a mask that keeps everything is 0, and not -0."""
    assert str(evaluation.entropy(1.0)) == "0.0"
    assert str(evaluation.entropy(0.0)) == "0.0"


# -------------------------------------------------------------------------------------------------
# what an older version of the program wrote


def test_what_an_older_version_wrote(tmp_path, monkeypatch, capsys):
    """Runs, masks, records and checkpoints of the program of commit 3cd4db0 are still read.

    golden/old has what it wrote about a tiny model and task: two runs of SMP-S as a record, one of
    them with its folder and its mask, and a run of PINS that was interrupted at step 21 of 48.
    unfinished.json has what the older program gets of the latter where nothing interrupts it.
    """
    shutil.copytree(GOLDEN / "old", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # the paths in the files are relative

    runs = read_record("record.jsonl")
    assert list(runs) == ["smp-0", "smp-1"]
    metrics = runs["smp-0"][0]["metrics"]
    assert report.main(["record.jsonl"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| pairs | smp-s | 0.5 | 0.5000 | 2 | 5 | accuracy ")

    assert evaluation.main(["smp-0", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for name, value in metrics.items():
        assert f"  {name:17} {100 * value:.2f}\n" in out
    argv = ["masks", "model", "smp.mask", "--task-file", "task.json", "--device", "cpu"]
    assert deploy.main(argv) == 0
    assert capsys.readouterr().out == f"smp.mask: pairs, density 0.5000: {show(metrics)}\n"

    expected = json.loads(Path("unfinished.json").read_text())
    assert train.main(["--out", "unfinished", "--resume"]) == 0
    assert "resumed unfinished at step 21" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("unfinished/metrics.jsonl").open()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx(expected["losses"], abs=1e-5)
    assert [row["step"] for row in rows if "teacher" in row] == expected["teachers"]
    result = json.loads(Path("unfinished/result.json").read_text())
    for name in ("metrics", "best", "achieved_density"):
        assert result[name] == expected[name]


def test_a_file_of_tensors():
    """The package safetensors reads every type, shape and layout, and the metadata."""
    rng = torch.Generator().manual_seed(0)
    tensors = {"flag": torch.rand(3, 5, generator=rng) > 0.5, "empty": torch.zeros(0, 4)}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensors[f"of {dtype}"] = torch.randn(4, 3, generator=rng).to(dtype).T  # not contiguous
    tensors |= {"number": torch.tensor(7), "byte": torch.arange(5, dtype=torch.uint8)}
    data = b"".join(bytes(part) for part in as_safetensors(tensors, {"form": "pt"}))
    found, metadata = parse_safetensors(data, "FILE")
    assert metadata == {"form": "pt"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
