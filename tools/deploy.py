"""Export, shrink or pack a finished run.

    python -m tools.deploy export RUN DIR          a folder that `transformers` loads by itself
    python -m tools.deploy compact RUN DIR         the same function with fewer weights
    python -m tools.deploy onnx RUN FILE.onnx      a file for ONNX Runtime, in fp32 or --int8
    python -m tools.deploy sparse RUN              its metrics and speed in sparse matrices
    python -m tools.deploy save-mask RUN FILE      an SMP run as one small file, a mask

Existing files are overwritten only with --force. Use what compact and save-mask have written:

    python -m tools.deploy evaluate DIR            metrics on dev of a compact folder or ONNX file
    python -m tools.deploy predict DIR FILE        its predictions for a split
    python -m tools.deploy masks BASE FILE FILE    metrics of mask files over one base in memory
    python -m tools.deploy masks BASE MNLI.npy --task mnli --words maybe no yes
                                                   of a mask that was released with the SMP paper
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so it runs from any folder

from support.terminal import Parser, UserError, program  # first: it says "loading torch"

import json
import time
from functools import partial

import numpy as np
import torch
from torch import nn

from data import Task, load_dev, with_settings
from eval import evaluate, manner, write_predictions
from kinds import KINDS
from models.checkpoint import config_values, from_config_values, holds
from models.compaction import add_padding, attention_of, change_heads, compact, drop_padding
from models.compaction import matrix_names
from models.runs import load_run, save_folder, trained_on
from models.sparse import sparse
from models.tokenizer import load_tokenizer, save_tokenizer
from support.files import atomic_write, is_stream, read_json, read_optional
from support.machine import DEVICES, autocast, inputs, pick_device
from support.matrices import encoder_linears
from support.tensors import read_safetensors, save_tensors
from support.terminal import COUNT_OR_OFF, show
from tools import onnx_files
from tools.masks import evaluate_masks, save_mask

# ---------- where to write ------------------------------------------------------------------------


def make_room(args, other="compact.json"):
    """Raise UserError where writing `args.target` would destroy something.

    That is a file, or a folder that is not empty. --force permits both, but nothing permits to
    write into a run, or into a folder with the file `other`, which is in another layout.
    """
    target = Path(args.target)
    if target.resolve().is_relative_to(Path(args.run).resolve()):
        raise UserError(f"{target}: belongs to the run; name another place")
    places = [target, *target.resolve().parents]
    if any((place / "metrics.jsonl").exists() for place in places):
        raise UserError(f"{target}: is a run, or lies in one; name another place")
    if (target / other).exists():
        raise UserError(f"{target}: has a {other}, of another layout; remove it, or name another")
    taken = target.exists() and not is_stream(target)
    if target.is_dir():
        taken = any(target.iterdir())
    if taken and not args.force:
        raise UserError(f"{target}: exists already; name another, or give --force")


# ---------- export --------------------------------------------------------------------------------


def export(args):
    """Write a run's model, with its masks applied, as a folder for `transformers`.

    The class that computes the same function depends on the output head:
    - A trained head: the class of its form, such as BertForSequenceClassification.
    - Label words by the whole MLM head: BertForMaskedLM. Its logits are read at the label words,
      which its config.json names in `label_words`.
    - Label words alone: BertForTokenClassification or, where starts and ends are decided,
      BertForQuestionAnswering. The rows of its linear layer are the embeddings of the words.
    - That of a decoder: GPT2LMHeadModel, with the decoding settings of the run.
    Label words are read at position 0, or where the kind of the task reads every position, there.
    """
    make_room(args)
    model, task, tokenizer, s = load_run(args.run, args.which)
    write_export(args.target, model, task, tokenizer, s["max_length"])


def write_export(folder, model, task, tokenizer, max_length):
    """Write the folder for `model`, with a README that shows how to read it."""
    folder = Path(folder)
    state = model.state_dict()
    labels = task.labels
    hub_class = model.hub_class
    if model.output_head == "words" and not hasattr(model, "cls"):
        layer, hub_class = model.heads["per token" if model.first_only else model.form]
        rows = model.embeddings.word_embeddings.weight[model.words]  # (K, C)
        state = {name: t for name, t in state.items() if not name.startswith("bert.pooler.")}
        state[f"{layer}.weight"] = rows
        state[f"{layer}.bias"] = torch.zeros(len(rows))
        labels = labels or task.words[-len(rows) :]
    save_folder(folder, model, state, task, tokenizer, labels, hub_class)
    if hub_class == model.mlm_class:
        config = read_json(folder / "config.json")
        config["label_words"] = task.words[-model.outputs :]
        config["label_word_ids"] = model.words.tolist()
        atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    lines = how_to_read(folder.name, model, task, hub_class, max_length)
    text = "".join(f"{line}\n" for line in lines)
    told = f"A {hub_class} that nanoprune has written for the task {task.name}. To read it:"
    atomic_write(folder / "README.md", f"{told}\n\n```python\n{text}```\n")
    print(f"{folder}: {hub_class}; to read it:\n{text}", end="")


def how_to_read(name, model, task, hub_class, max_length):
    """Return lines of Python that predict with the folder `name` and `transformers`."""
    generates = model.output_head == "vocabulary"
    auto_class = "AutoModel" + ("ForCausalLM" if generates else hub_class[hub_class.find("For") :])
    lines = [
        f"from transformers import {auto_class}, AutoTokenizer",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = {auto_class}.from_pretrained("{name}").eval()',
    ]
    if generates:
        source = "name : The Vaults | Type : pub" if task.options.get("mr") else "a source"
        return [
            *lines,
            f'inputs = tokenizer("{source}", return_tensors="pt")  # with the separator',
            'tokens = model.generate(**inputs)[0, inputs["input_ids"].size(1) :]',
            "text = tokenizer.decode(tokens, skip_special_tokens=True).strip()",
        ]
    words = model.output_head == "words"
    pooled = model.first_only
    inputs = '"a text"' if len(task.columns) == 1 else '"a text", "the second text"'
    cut = f"truncation=True, max_length={max_length}"
    lines.append(f'inputs = tokenizer({inputs}, {cut}, return_tensors="pt")')
    lines.append("outputs = model(**inputs)")
    place = "[0, 0]" if pooled and words else "[0]"  # of position 0, or of all
    if hub_class == model.mlm_class:
        lines.append(f"logits = outputs.logits{place}[..., model.config.label_word_ids]")
    elif hub_class.endswith("QuestionAnswering"):
        lines.append("logits = outputs.start_logits[0], outputs.end_logits[0]")
    else:
        lines.append(f"logits = outputs.logits{place}")
    return lines


# ---------- the compact folder --------------------------------------------------------------------
#
# compact.safetensors holds the state dict without the zeros that pad heads, compact.json what is
# needed to build the model, tokenizer.json the tokenizer.


def write_compact(folder, model, task, tokenizer, settings, sizes):
    """Write a compacted model as a folder in our own layout.

    The classes of `transformers` cannot hold heads of different sizes.
    """
    folder = Path(folder)
    state = model.state_dict()
    change_heads(state, matrix_names(model), sizes, drop_padding)
    words = getattr(model, "words", torch.tensor([]))  # a decoder has none
    about = {
        "task": settings["task"],
        "task_file": settings["task_file"],
        "max_length": settings["max_length"],
        "dtype": settings["dtype"],
        "head": model.output_head,
        "kind": task.kind,
        "settings": task.settings,  # of its kind
        "config": config_values(model),  # of the whole model
        "outputs": model.outputs,
        "words": words.tolist(),
        "labels": list(task.labels),
        "sizes": sizes,
    }
    save_tensors(folder / "compact.safetensors", state)
    save_tokenizer(folder, tokenizer, model.config)
    atomic_write(folder / "compact.json", json.dumps(about) + "\n")


def load_compact(folder):
    """Return (model, what compact.json says) of a folder that `compact` wrote.

    Raises UserError where it is damaged.
    """
    about = read_json(Path(folder) / "compact.json")
    state, _ = read_safetensors(Path(folder) / "compact.safetensors")
    try:
        model = build_compact(about, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: not a whole compact model ({reason}); write it again") from None
    return model, about


def build_compact(about, state):
    """Return the model of a compact folder, from its JSON and its state dict, which is changed."""
    Model, config = from_config_values(about["config"])
    form = KINDS[about.get("kind", Task.kind)].form  # older folders do not say it
    pooler = holds(state, "bert.pooler.")
    mlm = holds(state, "cls.predictions.")
    with torch.device("meta"):  # only the structure: values and sizes come from the file
        head = (about["head"], about["outputs"], about["words"])
        model = Model(config, *head, pooler, mlm, form)
    names = matrix_names(model)
    change_heads(state, names, about["sizes"], add_padding)
    for i, layer in enumerate(model.layers):
        query_sizes, _, units = about["sizes"][i]
        attention_of(layer, model.matrices).num_heads = len(query_sizes)
        for name in names[i].values():
            linear = model.get_submodule(name)
            linear.weight = nn.Parameter(state[f"{name}.weight"])
            linear.bias = nn.Parameter(state[f"{name}.bias"])
        if len(state[f"{names[i]['U']}.weight"]) != units:
            raise ValueError(f"layer {i} has other than {units} units")
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_compact(args):
    """Write a run's model compacted, and print what that saves and, with a check, changes.

    The layout of the folder is ours, or with --uniform that of `transformers`.
    """
    make_room(args, "compact.json" if args.uniform else "model.safetensors")
    device = pick_device(args.device)
    model, task, tokenizer, s = load_run(args.run, args.which)
    total = count_weights(model)
    units = model.config.intermediate_size
    sizes = compact(model, args.uniform, args.drop_rows)
    if args.uniform:
        write_export(args.target, model, task, tokenizer, s["max_length"])
        left = count_weights(model)
        kept = f"{model.config.intermediate_size:,} of {units:,} units in each layer"
    else:
        write_compact(args.target, model, task, tokenizer, s, sizes)
        copy_task(args.run, args.target)
        left = count_compact(sizes, model.config.hidden_size)
        kept = describe_compact(sizes, model.config)
    print(f"{args.target}: {left:,} of {total:,} encoder weights ({left / total:.3f}); {kept}")
    for i, (query_sizes, value_sizes, units) in enumerate(sizes):
        line = f"  layer {i:2}: "
        if query_sizes:
            queries = f"{sum(query_sizes)} query and {sum(value_sizes)} value dimensions"
            line += f"{len(query_sizes)} heads of {queries}, "
        print(f"{line}{units:,} units")
    if args.no_check:
        return
    before, _, _, _ = load_run(args.run, args.which)
    if not args.uniform:
        model, _ = load_compact(args.target)  # as it was written
    compare(before, model, load_dev(task, tokenizer, s["max_length"], args.data_dir), device)


def copy_task(run, folder):
    """Copy what describes a task of your own, if the run was on one."""
    path = Path(run) / "task.json"
    if path.is_file():
        atomic_write(Path(folder) / path.name, path.read_bytes())


def load_for_use(folder):
    """Return (model, task, tokenizer, settings) of a compact folder or ONNX file, as `load_run`.

    Raises UserError where it is damaged, or where its task file now describes another task.
    """
    if Path(folder).suffix == ".onnx":
        return onnx_files.load_onnx(folder)
    path = Path(folder) / "compact.json"
    if not path.is_file():
        raise UserError(f"{folder}: no compact.json; it is no folder that `compact` wrote")
    model, about = load_compact(folder)
    needed = {"task", "task_file", "max_length", "labels"}
    if not about.keys() >= needed or type(about["max_length"]) is not int:
        raise UserError(f"{path}: not whole; write it again")
    task = trained_on(folder, about)
    task = with_settings(task, about.get("settings"), path)  # older folders have none
    tokenizer = load_tokenizer(folder, model.config.vocab_size, model.config.framed)
    settings = {"max_length": about["max_length"], "dtype": about.get("dtype", "fp32")}
    return model, task, tokenizer, settings


def evaluate_compact(args):
    """Print the metrics on dev of a compact folder or an ONNX file."""
    device = pick_device(args.device)
    model, task, tokenizer, s = load_for_use(args.folder)
    dev_sets = load_dev(task, tokenizer, s["max_length"], args.data_dir)
    metrics = evaluate(model.to(device), dev_sets, device, s["dtype"])
    way = "ONNX Runtime" if Path(args.folder).suffix == ".onnx" else s["dtype"]
    print(f"{args.folder}: {task.name}, {way}{manner(dev_sets)}: {show(metrics)}")


def predict_compact(args):
    """Write the predictions of a compact folder or an ONNX file for a split."""
    device = pick_device(args.device)
    loaded = load_for_use(args.folder)
    write_predictions(loaded, device, args.data_dir, args.split, args.file)


def count_weights(model):
    """Return the number of weights in the encoder's matrices."""
    return sum(linear.weight.numel() for linear in encoder_linears(model))


def count_compact(sizes, hidden_size):
    """Return the number of weights in the encoder's matrices, without those that pad heads."""
    dimensions = 0
    for query_sizes, value_sizes, units in sizes:
        dimensions += sum(query_sizes) + sum(value_sizes) + units
    return 2 * hidden_size * dimensions  # a row or a column in each of two matrices


def describe_compact(sizes, config):
    """Return how many of the attention heads and units of a model are left."""
    heads = sum(len(query_sizes) for query_sizes, _, _ in sizes)
    units = sum(units for _, _, units in sizes)
    all_heads = len(sizes) * config.num_attention_heads
    all_units = len(sizes) * config.intermediate_size
    return f"{heads} of {all_heads} heads, {units:,} of {all_units:,} units"


# ---------- a file for ONNX Runtime ---------------------------------------------------------------


def export_onnx(args):
    """Write the model of a run or of a compact folder for ONNX Runtime, and compare the two.

    The model of a run is compacted before. With --int8 the matrices of the file are quantised.
    """
    make_room(args)
    if Path(args.target).suffix != ".onnx":
        raise UserError(f"{args.target}: expected a name that ends with .onnx")
    is_compact = Path(args.run, "compact.json").is_file()
    if is_compact and args.which == "best":
        raise UserError(f"--best: {args.run} has one model; compact the run with --best")
    onnx_files.packages()
    load = load_for_use if is_compact else partial(load_run, which=args.which)
    model, task, tokenizer, s = load(args.run)
    if not is_compact:
        compact(model)
    data = onnx_files.to_onnx(model)
    if args.int8:
        data = onnx_files.in_int8(data)
    task_file = read_optional(Path(args.run, "task.json"))
    onnx_files.save_onnx(args.target, data, model, task, tokenizer, s, task_file)
    print(f"{args.target}: {Path(args.target).stat().st_size / 1e6:.2f} MB")
    if args.no_check:
        return
    after, *_ = onnx_files.load_onnx(args.target)
    before, *_ = load(args.run)
    others = in_onnx_runtime(before)
    dev_sets = load_dev(task, tokenizer, s["max_length"], args.data_dir)
    apart = compare(before, after, dev_sets, torch.device("cpu"), others)
    if not args.int8 and apart > 1e-3:  # more than rounding
        raise UserError(f"{args.target}: computes something else than the run; do not use it")


def in_onnx_runtime(model):
    """Return [(name, model)] of a dense model in ONNX Runtime: in fp32 and in int8."""
    data = onnx_files.to_onnx(model)
    return [
        ("dense in ONNX Runtime", onnx_files.OnnxModel(data)),
        ("dense in ONNX Runtime, int8", onnx_files.OnnxModel(onnx_files.in_int8(data))),
    ]


# ---------- sparse execution ----------------------------------------------------------------------


def compare_sparse(args):
    """Print how many matrices sparse execution changes, and with a check what that gains."""
    cpu = torch.device("cpu")
    model, task, tokenizer, s = load_run(args.run, args.which)
    matrices = len(encoder_linears(model))
    print(f"{args.run}: {sparse(model)} of {matrices} matrices are sparse")
    dev_sets = load_dev(task, tokenizer, s["max_length"], args.data_dir)
    if args.no_check:
        print(f"  {show(evaluate(model, dev_sets, cpu, 'fp32'))}")
    else:
        before, _, _, _ = load_run(args.run, args.which)
        compare(before, model, dev_sets, cpu)


# ---------- two models of one function ------------------------------------------------------------


def clock(function, device):
    """Return the seconds that a call of `function` takes, with all its work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate(functions, device, repeat, warm=2):
    """Return the seconds (repeat, len(functions)) of `functions`, called in turn.

    A noisy machine is then noisy for all of them. `warm` rounds come before, and do not count.
    """
    rounds = []
    for _ in range(warm + repeat):
        rounds.append([clock(function, device) for function in functions])
    return np.array(rounds[warm:])


def compare(before, after, dev_sets, device, others=()):
    """Print how far the logits of two models on dev lie apart, their metrics, and their speed.

    `others`: [(name, model)] whose speed is compared, too. Return how far the logits lie apart.
    """
    dev = list(dev_sets.values())[0]
    before = before.to(device).eval()
    after = after.to(device).eval()
    kind = dev.kind
    if kind.own_head:
        most = furthest(before, after, dev, device)
        predicted = [kind.predict(model, dev, device, "fp32") for model in (before, after)]
        changed = sum(one != other for one, other in zip(*predicted))
        more = f"; {changed:,} of their texts differ"
    else:
        logits = [kind.logits(model, dev, device, "fp32") for model in (before, after)]
        most = (logits[0] - logits[1]).abs().max()
        predicted = [kind.predictions(table, dev) for table in logits]
        spelled = [kind.spell(found) for found in predicted]
        changed = sum(one != other for one, other in zip(*spelled))
        more = f"; {changed:,} predictions differ" if changed else ""
    print(f"logits on {len(dev):,} dev examples differ by {most:.1e} at most{more}")
    for what, found in zip(("before", "after"), predicted):
        print(f"  {what}: {show(kind.measure(found, dev.gold))}")
    for size in (1, 8, 32):
        batch = dev.collate(np.arange(min(size, len(dev))))
        speed(before, after, inputs(batch, device), device, others=others)
    return most


@torch.no_grad()
def furthest(before, after, dev, device):
    """Return how far the logits of two decoders lie apart, at most, at any token of the sources."""
    apart = []
    for rows in dev.by_tokens(512):
        batch = inputs(dev.collate(rows), device)
        apart.append((before(**batch) - after(**batch)).abs().max())  # of (B, T, V)
    return torch.stack(apart).max()


@torch.no_grad()
def speed(before, after, batch, device, repeat=7, others=()):
    """Print the times of one batch: a dense model in fp32 and in bf16, and another, in turn.

    Return the ratios (2,) of the first two to the last. `others`: [(name, model)], timed, too.
    """

    def in_bf16():
        with autocast(device, "bf16"):
            before(**batch)

    calls = [partial(before, **batch), in_bf16, partial(after, **batch)]
    calls += [partial(model, **batch) for _, model in others]
    seconds = alternate(calls, device, repeat)  # (repeat, 3 + others)
    ratios = np.median(seconds / seconds[:, 2:3], axis=0)
    fp32, bf16, ours, *_ = 1e3 * np.median(seconds, axis=0)  # milliseconds
    examples, length = batch["input_ids"].shape
    print(
        f"  {examples:3} x {length:3} tokens: dense {fp32:.1f} ms, in bf16 {bf16:.1f}, "
        f"this {ours:.1f}: {ratios[0]:.2f} and {ratios[1]:.2f} times as fast",
        flush=True,
    )
    for (name, _), ratio in zip(others, ratios[3:]):
        print(f"{'':21}{name} {ratio * ours:.1f} ms: this is {ratio:.2f} times as fast", flush=True)
    return ratios[:2]


# ---------- mask files ----------------------------------------------------------------------------


def write_mask(args):
    make_room(args)
    save_mask(args.run, args.target, args.which)


def measure_masks(args):
    device = pick_device(args.device)
    own = {"task_name": args.task, "words": args.words, "task_file": args.task_file}
    evaluate_masks(args.model, args.masks, device, args.data_dir, **own)


# ---------- the command line ----------------------------------------------------------------------


def parse(argv):
    """Return the arguments. Their `command` is the function that does what they ask for."""
    parser = Parser(__doc__)
    parser.prog = "python -m tools.deploy"
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add_command(name, function, text):
        added = commands.add_parser(name, description=text, help=text)
        added.set_defaults(command=function)
        return added.add_argument

    add = add_command("export", export, "write the run's model for `transformers`")
    of_run(add)
    new_place(add, "DIR")
    add = add_command("compact", save_compact, "write the run's model without what is idle")
    of_run(add)
    new_place(add, "DIR")
    rows = "first empty the rows that have fewer than R weights"
    add("--drop-rows", metavar="R", type=COUNT_OR_OFF, default=0, help=rows)
    add("--uniform", action="store_true", help="only units go; `transformers` loads it")
    with_data(add)
    without_check(add)
    add = add_command("onnx", export_onnx, "write the model of a run for ONNX Runtime")
    of_run(add)
    new_place(add, "FILE.onnx")
    add("--int8", action="store_true", help="quantise the matrices")
    add("--data-dir", metavar="DIR", default="data", help="folder of the data; default data")
    without_check(add)
    add = add_command("sparse", compare_sparse, "compare the model with itself in sparse matrices")
    of_run(add)
    add("--data-dir", metavar="DIR", default="data", help="folder of the data; default data")
    without_check(add)
    add = add_command("save-mask", write_mask, "write the run's mask")
    of_run(add)
    new_place(add, "FILE")
    written = "a folder that `compact` wrote, or a file that `onnx` wrote"
    add = add_command("evaluate", evaluate_compact, "print the metrics on dev of a written model")
    add("folder", metavar="DIR", help=written)
    with_data(add)
    add = add_command("predict", predict_compact, "write predictions of a written model")
    add("folder", metavar="DIR", help=written)
    add("file", metavar="FILE", help="file of predictions")
    add("--split", default="test", help="split to predict; default test")
    with_data(add)
    add = add_command("masks", measure_masks, "print the metrics of mask files over one base")
    add("model", metavar="BASE", help="the base model: a Hugging Face id or a folder")
    add("masks", metavar="FILE", nargs="+", help="a mask file")
    add("--task", help="the task, where the mask file does not name it")
    add("--task-file", metavar="JSON", help="your own task, if the run was on one")
    add("--words", nargs="+", help="label words other than the task's, in the order of the classes")
    with_data(add)
    return parser.parse_args(argv)


def of_run(add):
    add("run", metavar="RUN", help="run folder of train.py")
    best = "the best checkpoint on dev instead of the last step"
    add("--best", dest="which", action="store_const", const="best", default="model", help=best)


def new_place(add, name):
    add("target", metavar=name, help="where to write")
    add("--force", action="store_true", help="overwrite what exists")


def with_data(add):
    add("--data-dir", metavar="DIR", default="data", help="folder of the data; default data")
    add("--device", default="auto", choices=DEVICES)


def without_check(add):
    add("--no-check", action="store_true", help="skip comparison and timing")


@program
def main(argv=None):
    args = parse(argv)
    args.command(args)


if __name__ == "__main__":
    sys.exit(main())
