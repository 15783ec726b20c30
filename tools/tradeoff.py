"""Speed against the metric on dev, of runs as they would be deployed on a CPU.

    python -m tools.tradeoff RUN... --data-dir GLUE --picture speed.png

The dense run of a task is measured in PyTorch and in ONNX Runtime, in fp32 and int8, and in int8 as
torch exports it by itself, too. Any other run is compacted and measured in ONNX Runtime in int8
and, where few weights are left, with sparse matrices. All models of a task are timed in turn, in
one process. Speed is that of 8 examples of the task's own lengths, over that of the dense model in
PyTorch.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so it runs from any folder

from support.terminal import Parser, UserError, program  # first: it says "loading torch"

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data import load_dev
from models.compaction import compact
from models.runs import density_of, load_run
from models.sparse import sparse
from support.machine import inputs
from support.terminal import COUNT, as_shown, figure
from tools import onnx_files
from tools.deploy import alternate
from tools.pictures import new_figure, save_figure

CPU = torch.device("cpu")
EXAMPLES = 8  # in a batch
BATCHES = 4  # in a round
INT8 = "ONNX Runtime, int8"  # the name of this way
PLAIN = INT8 + ", torch's export"  # of what a user has without this project


@dataclass
class Way:
    """A model as it would be deployed."""

    run: str
    name: str
    model: nn.Module
    density: float
    metric: float = None  # the first one on dev
    speed: float = None  # over the first way of the task


@torch.no_grad()
def ways_of(run, model, method):
    """Return the ways to deploy the model of a run, which is changed."""
    density = density_of(model)
    own = copy.deepcopy(model.eval())  # without dropout
    thin = copy.deepcopy(model)
    if method != "dense":
        compact(model)
    data = onnx_files.to_onnx(model)
    found = {}
    if method == "dense":
        plain = onnx_files.in_int8(onnx_files.to_onnx(model, operators={}))
        found["PyTorch"] = own
        found["ONNX Runtime"] = onnx_files.OnnxModel(data)
        found[PLAIN] = onnx_files.OnnxModel(plain)
    found[INT8] = onnx_files.OnnxModel(onnx_files.in_int8(data))
    if sparse(thin):
        found["sparse"] = thin
    return [Way(Path(run).name, name, way, density) for name, way in found.items()]


def measure(ways, dev, repeat):
    """Set the metric and the speed of all ways of a task."""
    rows = np.linspace(0, len(dev) - 1, EXAMPLES * BATCHES).astype(int)
    batches = [inputs(dev.collate(some), CPU) for some in np.split(rows, BATCHES)]

    def run_all(model):
        for batch in batches:
            model(**batch)

    kind = dev.kind
    for way in ways:
        predicted = kind.predict(way.model, dev, CPU, "fp32")
        way.metric = next(iter(kind.measure(predicted, dev.gold).values()))
    with torch.no_grad():
        calls = [lambda way=way: run_all(way.model) for way in ways]
        seconds = alternate(calls, CPU, repeat)  # (repeat, n)
    speeds = np.median(seconds[:, :1] / seconds, axis=0)
    for way, speed in zip(ways, speeds):
        way.speed = float(speed)


def draw(picture, tasks):
    """Draw speed against the metric: a panel a task, a colour a way, and the name of each run."""
    panels = picture.subplots(1, len(tasks), squeeze=False)[0]
    names = sorted({way.name for ways in tasks.values() for way in ways})
    for panel, ((task, metric), ways) in zip(panels, tasks.items()):
        for name in names:
            here = [way for way in ways if way.name == name]
            speeds = [way.speed for way in here]
            values = [as_shown(metric, way.metric) for way in here]
            panel.scatter(speeds, values, color=f"C{names.index(name)}", label=name)
        for way in {way.run: way for way in ways}.values():  # the last way of each run
            place = (way.speed, as_shown(metric, way.metric))
            panel.annotate(way.run, place, (4, 3), textcoords="offset points", fontsize=7)
        xlabel = f"times as fast as dense PyTorch in fp32, {EXAMPLES} examples"
        panel.set(title=task, xlabel=xlabel, ylabel=f"{metric} on dev")
        panel.margins(x=0.25)
        panel.legend(fontsize="small", loc="best")


def parse(argv):
    parser = Parser(__doc__)
    parser.prog = "python -m tools.tradeoff"
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder of train.py; the first is dense")
    add("--data-dir", metavar="DIR", default="data", help="folder of the data; default data")
    add("--picture", metavar="FILE", help="draw the table, too")
    add("--repeat", type=COUNT, default=9, help="alternating rounds; default 9")
    return parser.parse_args(argv)


@program
def main(argv=None):
    args = parse(argv)
    onnx_files.packages()
    tasks = {}  # {(task, metric): ways}
    devs = {}
    tokens = {}  # {(task, metric): what makes the token ids of the dev set}
    for run in args.runs:
        model, task, tokenizer, s = load_run(run)
        key = (task.name, task.metrics[0])
        read_by = (s["max_length"], tokenizer.to_str())
        if key not in tasks:
            if s["method"] != "dense":
                raise UserError(f"{run}: the first run on {task.name} shall be a dense one")
            dev_sets = load_dev(task, tokenizer, s["max_length"], args.data_dir)
            devs[key] = next(iter(dev_sets.values()))
            tasks[key] = []
            tokens[key] = read_by
        if tokens[key] != read_by:
            told = f"other tokens or --max-length than the first run on {task.name}"
            raise UserError(f"{run}: {told}")
        tasks[key] += ways_of(run, model, s["method"])
    if args.picture:
        size = (6.5 * len(tasks), 4.5)
        picture, path = new_figure(Path(args.picture), "--picture", size)
    print("| task | run | density | way | dev | times as fast as dense PyTorch | as dense int8 |")
    print("|---|---|---|---|---|---|---|")
    for (task, metric), ways in tasks.items():
        measure(ways, devs[task, metric], args.repeat)
        int8 = next(way.speed for way in ways if way.name == INT8)
        for way in ways:
            shown = f"{figure(metric, way.metric)} | {way.speed:.2f} | {way.speed / int8:.2f}"
            print(f"| {task} | {way.run} | {way.density:.3f} | {way.name} | {metric} {shown} |")
    if args.picture:
        draw(picture, tasks)
        save_figure(picture, path)
        print(path)


if __name__ == "__main__":
    sys.exit(main())
