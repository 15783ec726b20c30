"""What a command shows while it works, and the ways to look before, or to use, a run."""

import io
import json
import os
import re
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
from conftest import score_task
from test_errors import refused

import data
import eval as evaluation
import train
from kinds import classify, span, text
from models import resume
from models.checkpoint import load_model
from support import fetch, terminal
from support.matrices import encoder_linears
from support.terminal import UserError
from tools import deploy, pictures, report


def on_a_terminal(argv):
    """Run a command with a terminal of 80 columns as its output; return all that it wrote."""
    import pty

    ours, theirs = pty.openpty()
    here = os.environ | {"COLUMNS": "80", "LINES": "24", "OMP_NUM_THREADS": "1"}
    process = forks.Fork(argv, stdout=theirs, stderr=theirs, env=here)
    os.close(theirs)
    written = b""
    while True:
        try:
            block = os.read(ours, 1 << 16)
        except OSError:  # the command has ended
            block = b""
        if not block:
            break
        written += block
    os.close(ours)
    assert process.wait() == 0, written
    return written.decode()


def begin(background, fixture):
    """Start a run on a terminal; return the future of what it shows."""
    argv = ["train", *fixture("tiny"), "--max-steps", "250", "--log-every", "20"]
    folder = fixture("tmp_path_factory").mktemp("live")
    argv += ["--eval-every", "249", "--out", str(folder / "run")]
    return background.call(on_a_terminal, argv)


@pytest.fixture
def live_output(begun):
    """What a run of 250 steps shows on a terminal."""
    return begun.result()


def test_one_live_line_on_a_terminal(live_output):
    """A terminal of 80 columns shows whole lines, and one line that is renewed in place.

    The line has the steps done, the time gone and the time left, as mm:ss. It goes when the work
    is done, and the lines that stay are whole.
    """
    text = live_output
    assert text.startswith("settings: ")
    shown = [part for part in re.split(r"[\r\n]+", text) if part.startswith("train:")]
    assert len(shown) > 1
    assert max(map(len, shown)) < 80
    layout = r"train: +\d+%\|.*\| \d+/250 \[\d\d:\d\d<(\d\d:\d\d|\?)(, loss .*, density [\d.]+)?\]"
    for line in shown:
        assert re.fullmatch(layout, line), line
    assert "loss" in shown[-1]
    after = text.rsplit("train:", 1)[1]
    assert "\r" + 79 * " " + "\r" in after  # it is wiped away
    assert " 99.6%  step 249/250  density" in text


def test_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
    """In a log file the live line becomes lines, one every 30 seconds, without control characters.

    Work that is over sooner shows nothing.
    """
    now = [100.0]
    bar = terminal.live("work", 60)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = now[0]
    for _ in range(60):
        now[0] += 1.7
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # in 102 seconds
    assert all(re.fullmatch(r"work: +\d+%\|.*\| \d+/60 \[\d\d:\d\d<\d\d:\d\d\]", x) for x in lines)
    with terminal.live("quick", 3) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_only_rank_0_shows_it(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # it means nothing without a WORLD_SIZE
    assert not terminal.live("work", 3).disable
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert terminal.live("work", 3).disable
    monkeypatch.setenv("RANK", "0")
    assert not terminal.live("work", 3).disable


def test_every_long_work_is_shown(tiny, tmp_path, monkeypatch):
    """Tokenisation, evaluation, the teacher's table, training, and compaction's checks count up.

    Each arrives at its total.
    """
    shown = []

    def noted(what, total, **options):
        bar = terminal.tqdm(total=total, file=io.StringIO(), **options)
        shown.append((what, bar))
        return bar

    for module in (classify, span, text, train):
        monkeypatch.setattr(module, "live", noted)
    fresh = [*tiny[:5], str(tmp_path / "data"), *tiny[6:]]
    out = tmp_path / "run"
    flags = ["--method", "dense", "--max-steps", "3", "--eval-every", "2", "--teacher", "self"]
    assert train.main([*fresh, *flags, "--out", str(out)]) == 0
    names = [what for what, _ in shown]
    # two splits; then two evaluations and, after the first, the table of the self-teacher
    assert names == ["tokenise", "tokenise", "train", "predict", "predict", "predict"]
    argv = ["compact", str(out), str(tmp_path / "small"), "--data-dir", fresh[5], "--device", "cpu"]
    assert deploy.main(argv) == 0
    assert [what for what, _ in shown[6:]] == ["predict", "predict"]
    assert all(bar.n == bar.total > 0 for _, bar in shown)


def test_speed_is_that_of_training(tiny, tmp_path, monkeypatch):
    """Evaluations, and the passes of a self-teacher, do not count in the examples per second.

    On the clock of this test a step takes a second, an evaluation a hundred, and a table of the
    teacher a thousand.
    """
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    for module in (train, resume):
        monkeypatch.setattr(module, "time", clock)

    def lasting(seconds, function):
        def slow(*args):
            now[0] += seconds
            return function(*args)

        return slow

    monkeypatch.setattr(train, "backward", lasting(1, train.backward))
    monkeypatch.setattr(train, "evaluate", lasting(100, train.evaluate))
    monkeypatch.setattr(classify.Classify, "teach", lasting(1000, classify.Classify.teach))
    flags = ["--method", "dense", "--max-steps", "4", "--eval-every", "1", "--teacher", "self"]
    assert train.main([*tiny, *flags, "--out", str(tmp_path / "run")]) == 0
    assert now[0] >= 4 + 4 * 100 + 1000
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    speeds = [row["examples_per_second"] for row in rows if "loss" in row]
    assert speeds == [15.6] * 4  # 203 examples in 13 steps
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["examples_per_second"] == 15.62
    assert result["train_seconds"] == now[0]


class Drip(BaseHTTPRequestHandler):
    """Sends 3,000 bytes in six pieces, one after another."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "3000")
        self.end_headers()
        for _ in range(6):
            self.wfile.write(bytes(500))
            self.wfile.flush()
            time.sleep(0.03)


def test_a_download_counts_what_has_arrived(tmp_path, monkeypatch):
    """The bar of a download moves with each piece that arrives."""
    counts = []

    class Bar:
        def __init__(self, *args, **options):
            self.args = args

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def update(self, count):
            counts.append(count)

    server = HTTPServer(("127.0.0.1", 0), Drip)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("GLUE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(fetch, "live", Bar)
    sha256 = data.hashlib.sha256(bytes(3000)).hexdigest()
    fetch.download(("a/file", sha256), tmp_path / "file")
    server.shutdown()
    server.server_close()
    assert sum(counts) == 3000
    assert len(counts) >= 4


# -------------------------------------------------------------------------------------------------
# looking before


def test_dry_run(tiny, tmp_path, monkeypatch, capsys):
    """--dry-run prints the settings that differ from the defaults, and their source; no more.

    What it prints are flags with which the same settings come out.
    """
    monkeypatch.chdir(tmp_path)
    argv = ["--model", tiny[1], "--task", "rte", "--method", "pins", "--density", "0.3"]
    assert train.main([*argv, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) < 80
    said = " ".join(out.split()).removeprefix("settings: ")
    flags, source = said.split(" (what was not given is ")
    assert source == "from the recipe: PINS on RTE)"
    parse = partial(terminal.parse_settings, train.Settings, "")
    again = train.settings_from(parse(flags.split()))
    assert again == train.settings_from(parse(argv))
    assert "--epochs 20" in out
    assert "--seed" not in flags
    argv = ["--no-redistribute", "--lr", "0", "--out", "a run"]
    assert train.main([*argv, "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for flag in ("--no-redistribute", "--lr 0.0", "--out 'a run'"):
        assert flag in out
    assert train.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "--method dense" in out and "--out runs/demo/smp-s" in " ".join(out.split())
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_resumed_run(tiny, tmp_path, capsys):
    """Where a run is resumed, the settings are those of the run."""
    out = tmp_path / "run"
    assert train.main([*tiny, "--max-steps", "2", "--seed", "7", "--out", str(out)]) == 0
    capsys.readouterr()
    assert train.main(["--out", str(out), "--resume", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--seed 7" in said
    assert f"from {out}/config.json" in said


# -------------------------------------------------------------------------------------------------
# using a run


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A finished run on pairs of texts, and one on single texts with a value as its label."""
    folder = tmp_path_factory.mktemp("used")
    assert train.main([*tiny, "--max-steps", "3", "--out", str(folder / "pairs")]) == 0
    task = str(score_task(tiny, folder))
    flags = [*tiny[:3], task, *tiny[4:], "--method", "dense", "--lr", "1e-2"]
    assert train.main([*flags, "--max-steps", "3", "--out", str(folder / "values")]) == 0
    return folder


def test_input_of_pairs(tiny, made, tmp_path, capsys):
    """`eval.py RUN --input FILE` labels a TSV without labels as the run labels the same texts.

    Each row has the prediction, the probability of each class, and the texts.
    """
    lines = (Path(tiny[3]).parent / "dev.tsv").read_text().splitlines()
    texts = [line.split("\t")[:2] for line in lines[1:]]
    path = tmp_path / "own.tsv"
    path.write_text("b\tid\ta\n" + "".join(f"{b}\t{i}\t{a}\n" for i, (a, b) in enumerate(texts)))
    capsys.readouterr()
    assert evaluation.main([str(made / "pairs"), "--input", str(path)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == "prediction\tno\tyes\ta\tb"
    rows = [row.split("\t") for row in rows]
    assert [row[3:] for row in rows] == texts

    file = tmp_path / "p.tsv"
    argv = ["--predictions", str(file), "--split", "dev", "--data-dir", tiny[5]]
    assert evaluation.main([str(made / "pairs"), *argv]) == 0
    said = [line.split("\t")[1] for line in file.read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == said
    for row in rows:
        assert all(re.fullmatch(r"[01]\.\d{4}", text) for text in row[1:3])
        no, yes = map(float, row[1:3])
        assert no + yes == pytest.approx(1, abs=2e-4)
        assert row[0] == ("yes" if yes > no else "no")


def test_input_of_lines(tiny, made, monkeypatch, capsys):
    """`--input -` reads a text from each line of standard input, or two with a tab between them.

    Of the texts of a split it gives the values that the run predicts there, within their range.
    """

    def typed(text):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))

    run = str(made / "values")
    argv = [run, "--split", "dev", "--data-dir", tiny[5], "--predictions", "/dev/stdout"]
    capsys.readouterr()
    assert evaluation.main(argv) == 0
    expected = [float(line.split("\t")[1]) for line in capsys.readouterr().out.splitlines()[1:]]
    texts = [line.split("\t")[1] for line in (made / "dev.tsv").read_text().splitlines()[1:]]
    typed("".join(f"{text}\n" for text in texts))
    assert evaluation.main([run, "--input", "-"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == "prediction\tb"
    assert [row.split("\t")[1] for row in rows] == texts
    found = [float(row.split("\t")[0]) for row in rows]
    assert found == pytest.approx(np.clip(expected, 0, 5), abs=2e-4)
    assert len(set(found)) > 10
    typed("w1\tw2\nw3\n")
    argv = [made / "pairs", "--input", "-"]
    refused(capsys, argv, "standard input:2:", '"b" is missing', main=evaluation.main)
    typed("")
    refused(capsys, argv, "standard input: no row", main=evaluation.main)


def test_a_compact_folder_is_used(tiny, made, tmp_path, capsys):
    """Metrics and predictions of a compact folder are what the run gives.

    With --no-check the folder is written without a comparison and without times.
    """
    run = made / "pairs"
    folder = tmp_path / "small"
    assert deploy.main(["compact", str(run), str(folder), "--no-check"]) == 0
    out = capsys.readouterr().out
    assert "differ by" not in out and "times as fast" not in out
    assert "encoder weights" in out
    own = ["--data-dir", tiny[5], "--device", "cpu"]
    assert deploy.main(["evaluate", str(folder), *own]) == 0
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert capsys.readouterr().out == f"{folder}: pairs, fp32: {terminal.show(metrics)}\n"
    paths = [tmp_path / "ours.tsv", tmp_path / "theirs.tsv"]
    flags = ["--split", "dev", "--data-dir", tiny[5], "--device", "cpu"]
    assert deploy.main(["predict", str(folder), str(paths[0]), *flags]) == 0
    assert evaluation.main([str(run), "--predictions", str(paths[1]), *flags]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()


# -------------------------------------------------------------------------------------------------
# plots


def test_plots(made, tmp_path, capsys):
    """Curves begin at step 0 and show negative metrics; layers are whole numbers.

    The axes have the colours of their lines, and colours of densities mean the same everywhere.
    """
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    rows = pictures.read_log(made / "values")
    assert (rows[0]["step"], rows[0]["density"]) == (0, 1.0)
    rows.append({"step": 4, "density": 0.1, "metrics": {"pearson": -0.4}})
    figure = Figure()
    curves, map_axes = figure.subplots(1, 2)
    pictures.draw_curves(curves, rows, "pearson")
    assert curves.get_xlim() == (0, 4)
    assert curves.get_ylim()[0] < -0.4
    loss_axes = figure.axes[-1]
    assert curves.yaxis.label.get_color() == curves.lines[0].get_color()
    assert loss_axes.yaxis.label.get_color() == loss_axes.lines[0].get_color()
    assert loss_axes.get_legend() is not None
    for densities in (np.full((3, 2), 0.1), np.full((3, 2), 0.7)):
        pictures.draw_densities(figure, map_axes, densities, "head", names=range(2))
        assert (map_axes.images[-1].norm.vmin, map_axes.images[-1].norm.vmax) == (0, 1)
        assert all(tick == round(tick) for tick in map_axes.get_yticks())

    assert report.main([str(made / "pairs"), "--plot", str(tmp_path / "picture")]) == 0
    assert f"{tmp_path}/picture.png: " in capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    argv = [made / "pairs", "--plot"]
    refused(capsys, [*argv, tmp_path / "x.doc"], "x.doc", "png", main=report.main)
    refused(capsys, [*argv, "."], "name of a file", main=report.main)
    assert report.main([str(word) for word in [*argv, tmp_path / "new" / "x.svg"]]) == 0
    assert (tmp_path / "new" / "x.svg").read_text().startswith("<?xml")


def test_curves(made, tmp_path, capsys):
    """Seeds are one point with a band, densities one line, other settings another line."""
    pytest.importorskip("matplotlib")
    settings = {"method": "smp-s", "teacher": None, "regression": "value", "lr": 1, "seed": 0}
    found = []
    runs = [(1, 0.1, 0, 0.5), (1, 0.1, 1, 0.7), (1, 0.3, 0, 0.8)]
    runs += [(2, 0.3, 0, 0.0), (3, 0.5, 0, 0.9)]  # one as the third, and one alone
    for lr, density, seed, value in runs:
        result = {"task": "t", "method": "smp-s", "density": density, "metrics": {"f1": value}}
        found.append((result, settings | {"lr": lr, "density": density, "seed": seed}))
    lines = report.densities_of_lines(found)
    assert lines == {
        ("t", "smp-s --lr 1"): {0.1: [50.0, 70.0], 0.3: [80.0]},
        ("t", "smp-s --lr 2"): {0.3: [0.0]},
        ("t", "smp-s --lr 3"): {0.5: [90.0]},
    }
    for _, settings in found:
        settings["lr"] = settings["density"]  # as a recipe may say
    assert report.densities_of_lines(found[:3]) == {
        ("t", "smp-s"): {0.1: [50.0, 70.0], 0.3: [80.0]}
    }
    assert pictures.spread([50.0, 70.0]) == pytest.approx(200**0.5)
    runs = [str(made / "pairs"), str(made / "values")]
    assert report.main([*runs, "--curve", str(tmp_path / "curve")]) == 0
    assert "2 tasks" in capsys.readouterr().out
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    runs += ["--curve", str(tmp_path / "weights.png"), "--against", "weights"]
    assert report.main(runs) == 0
    both = [made / "pairs", "--curve", tmp_path / "x.png", "--density", "0.1"]
    refused(capsys, both, "--curve and --density: give one", main=report.main)
    more = [made / "pairs", "--density", "0.5", "1.5"]
    refused(capsys, more, "--density: 1.5: expected a number in (0, 1]", main=report.main)
    alone = [made / "pairs", "--against", "weights"]
    refused(capsys, alone, "--against: only with --curve", main=report.main)


def test_a_method_keeps_its_colour():
    """Against weights a model has a style, too. Each of up to 60 labels looks different."""
    looks = pictures.looks_of(["BIG dense", "BIG smp-s", "SMALL smp-s"], by_model=True)
    (_, one), (color, _), (same_color, other) = looks.values()
    assert color == same_color and one != other
    labels = [f"{model} {i:02}" for model in ("BIG", "SMALL") for i in range(30)]
    for by_model in (False, True):
        assert len(set(pictures.looks_of(labels, by_model).values())) == 60


def test_weights_in_place_of_densities(tiny, monkeypatch):
    """A point is at the number of weights that were kept, and models have lines of their own."""
    settings = {"method": "smp-s", "teacher": None, "regression": "value", "seed": 0}
    found = []
    for model, achieved in (("$ONE", 0.1), ("$ONE", 0.5), ("$OTHER/model", 0.5)):
        result = {"task": "t", "method": "smp-s", "density": 0.4, "metrics": {"f1": achieved}}
        found.append((result | {"achieved_density": achieved}, settings | {"model": model}))
    monkeypatch.delenv("ONE", raising=False)
    with pytest.raises(UserError, match=r"\$ONE is not set"):
        report.encoder_sizes(found[:1])
    monkeypatch.setenv("ONE", tiny[1])
    monkeypatch.setenv("OTHER", str(Path(tiny[1]).parent))
    sizes = report.encoder_sizes(found)
    model = load_model(tiny[1], "classifier", 2)
    assert set(sizes.values()) == {sum(w.weight.numel() for w in encoder_linears(model))}
    assert report.densities_of_lines(found, dict.fromkeys(sizes, 2000)) == {
        ("t", "ONE smp-s"): {200.0: [10.0], 1000.0: [50.0]},
        ("t", "model smp-s"): {1000.0: [50.0]},
    }
