"""How fast this program is, as ratios that are measured in one run.

    python -m tools.bench                             every part, on the GPU if there is one
    python -m tools.bench step select                 some of the parts
    python -m tools.bench cost                        what a step costs on a GPU, without one
    python -m tools.bench throughput --data-dir GLUE  on a task's texts, against the published way
    python -m tools.bench trainer --data-dir GLUE     the same, against transformers.Trainer

Each ratio is the median over alternating runs (one of ours, one of theirs, and again), so that a
noisy machine is noisy for both. Weights are random, in the shape of a real model: MiniLM-L6-H384 on
a CPU, BERT-base on a GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so it runs from any folder

from support.terminal import Parser, UserError, program  # first: it says "loading torch"

import copy
import itertools
import tempfile
import time
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import batches, get_task, kind_of, load_dataset
from model import Bert, BertConfig
from models.sparse import SIDE, sparse
from models.tokenizer import load_tokenizer
from prune import CRITERIA, METHODS, mask_matrices
from support.fetch import DEMO
from support.machine import DEVICES, inputs, pick_device
from support.matrices import encoder_linears
from support.patterns import squares
from support.selection import kth_largest, select_on_device
from support.terminal import COUNT, POSITIVE
from tools import cost, deploy
from tools.deploy import alternate, clock
from train import settings_from

SHAPES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "base": {},  # BertConfig's own
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (128, 40)  # tokens of a made-up example
BATCH = 32  # examples
VOCABULARY = 30522  # tokens that BERT knows

# ---------- the published way, in its plainest form -----------------------------------------------
#
# - A full sort of every matrix in every forward.
# - Every sentence is padded to 128 tokens, and all is in fp32.
# - The regulariser goes through autograd.
# - Every position of the last layer is computed.
# - The loss is read after every step.


class SortMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, density):
        mask = torch.zeros_like(scores)
        order = scores.flatten().sort(descending=True).indices  # (out, in) -> (numel,)
        kept = order[: int(density * scores.numel())]
        mask.view(-1)[kept] = 1
        return mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class PublishedLinear(nn.Linear):
    def __init__(self, linear, first):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scores = nn.Parameter(torch.full_like(linear.weight, first))

    def forward(self, x):
        weight = self.weight * SortMask.apply(self.scores, 0.1)
        return F.linear(x, weight, self.bias)  # (..., in) -> (..., out)


def published_step(shape, device):
    """Return a function of a batch that does a step of SMP-L as the released code does it."""
    config = BertConfig(**SHAPES[shape])
    model = Bert(config, "words", words=[5, 6], pooler=False).to(device)
    model.requires_grad_(False)
    scores = []
    for column in mask_matrices(model, PublishedLinear).values():
        scores += [linear.scores for linear in column]
    optimizer = torch.optim.AdamW(scores, lr=2e-2, weight_decay=0.0)
    embedding = model.embeddings.word_embeddings.weight  # (V, C)
    model.train()

    def step(batch):
        first = model.bert(**inputs(batch, device))[:, 0]  # (B, T, C) -> (B, C)
        logits = model.cls["predictions"](first, embedding, model.words)  # (B, K)
        loss = F.cross_entropy(logits, batch["labels"].to(device))
        regulariser = sum(torch.sigmoid(s).mean() for s in scores)
        loss = loss + 200.0 * regulariser / len(scores)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scores, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


# ---------- our way: the pieces of train.py's loop ------------------------------------------------


def our_step(name, shape, device, dtype, mark=lambda part: None):
    """Return a function of a batch that does a step of the method `name` as train.py does it.

    The first step is in the middle of the ramp. `mark` is told of each of tools.cost.PARTS before
    it begins.
    """
    Method = METHODS[name]
    words = [5, 6] if Method.output_head == "words" else []
    with device:  # makes the parameters there at once; on "meta" they get no random values
        model = Bert(
            BertConfig(**SHAPES[shape]),
            Method.output_head,
            outputs=2,
            words=words,
            pooler=not words,
            mlm=bool(words),
        ).to(device)
    given = {"model": str(DEMO), "task": "cola", "method": name}
    kind = kind_of(get_task("cola"))
    if name != "dense":
        given["density"] = 0.1
    method = Method(model, settings_from(given), total_steps=1000)
    optimizer = torch.optim.AdamW(method.groups(), fused=device.type in ("cpu", "cuda", "meta"))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    number = 500
    method.update(number)

    def step(batch):
        nonlocal number
        mark("forward")
        loss = kind.decide(model, batch, device, dtype).losses.mean()
        mark("backward")
        loss.backward()
        mark("regulariser")
        method.penalise(number)
        mark("optimizer")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        mark("masks")
        method.observe(number, lr=3e-5)
        mark("optimizer")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        number += 1
        mark("masks")
        method.update(number)

    return step


def synthetic(length, size=BATCH):
    """Return a batch of `size` random examples of `length` tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (size, length), generator=generator)  # (B, T)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "labels": torch.arange(size) % 2,
        "rows": torch.arange(size),
    }


def pad(batch, length):
    """Return the batch with every row padded to `length`, as the published code has it."""
    padded = {}
    for name, tensor in batch.items():
        if tensor.dim() == 2:
            tensor = F.pad(tensor, (0, length - tensor.size(1)))  # (B, T) -> (B, length)
        padded[name] = tensor
    return padded


def show(what, seconds, names):
    """Print and return the median of the ratios of the first to the last of `seconds` (repeat, n).

    Their range is printed, too, and the median times of both, which `names` names.
    """
    ratios = seconds[:, 0] / seconds[:, -1]
    median = float(np.median(ratios))
    first, *_, last = 1e3 * np.median(seconds, axis=0)  # milliseconds
    times = f"{names[0]} {first:.4g} ms, {names[1]} {last:.4g} ms"
    span = f"{ratios.min():.3f} to {ratios.max():.3f}"
    print(f"{what:44} {median:7.3f}  ({span}; {times})", flush=True)
    return median


def tokenizer_of(args):
    """Return the tokenizer of --tokenizer, or that of the demo."""
    return load_tokenizer(args.tokenizer or DEMO, VOCABULARY)


# ---------- the parts: each is a function of the flags and the device -----------------------------


def part_step(args, device):
    """Compare a step of each method with one of dense fine-tuning by fused AdamW."""
    for dtype in args.dtypes:
        for length in LENGTHS:
            batch = synthetic(length)
            dense = our_step("dense", args.shape, device, dtype)
            for method in args.methods or ("smp-l", "smp-s", "movement", "pins"):
                ours = our_step(method, args.shape, device, dtype)
                steps = [partial(ours, batch), partial(dense, batch)]
                seconds = alternate(steps, device, args.repeat)
                title = f"step, {method} / dense, length {length}, {dtype}"
                show(title, seconds, (method, "dense"))


def part_throughput(args, device):
    """Compare SMP-S with the published way, on the texts of a task.

    SMP-S is in the last dtype. The published way is also compared with a dense step.
    """
    tokenizer = tokenizer_of(args)
    dtype = args.dtypes[-1]
    published = published_step(args.shape, device)
    ours = our_step("smp-s", args.shape, device, dtype)
    dense = our_step("dense", args.shape, device, "fp32")
    batch = synthetic(128)
    seconds = alternate([partial(published, batch), partial(dense, batch)], device, args.repeat)
    show("the published way / dense, length 128, fp32", seconds, ("published", "dense"))
    for name in ("rte", "cola"):
        dataset = load_dataset(get_task(name), "train", tokenizer, 128, args.data_dir)
        rows = []
        for examples in some_batches(dataset, args.repeat + 2):
            trimmed = dataset.collate(examples)
            padded = pad(trimmed, 128)
            theirs = clock(partial(published, padded), device)
            rows.append([theirs, clock(partial(ours, trimmed), device)])
        seconds = np.array(rows[2:])  # the first two do not count
        show(f"throughput, {name}, ours / published", seconds, ("published", f"smp-s {dtype}"))


def some_batches(dataset, count):
    """Return about `count` batches of an epoch, spread over it; a short one is left out."""
    order = batches(dataset.lengths, BATCH, seed=0, epoch=0)
    few = [order[i] for i in np.linspace(0, len(order) - 1, count).astype(int)]
    whole = [examples for examples in few if len(examples) == BATCH]
    return whole or few


def part_select(args, device):
    """Compare ways to find the k-th largest of 3072 x 768 values exactly; k is 10% of them."""
    scores = torch.randn(3072 * 768, device=device) * 0.1
    size = scores.numel()
    k = size // 10
    ways = {
        "sort": lambda: scores.sort(descending=True),
        "topk": lambda: scores.topk(k, sorted=False),
        "kthvalue": lambda: scores.kthvalue(size - k + 1),
    }
    if device.type == "cpu":
        flat = scores.numpy()
        ways["np.partition"] = lambda: np.partition(flat, size - k)
        ways["ours"] = lambda: kth_largest(flat, k)
    else:
        number = torch.full((1, 1), k, device=device)
        matrix = scores.view(1, 3072, 768)
        ways["ours, the whole mask"] = lambda: select_on_device(matrix, number)
    seconds = alternate(list(ways.values()), device, args.repeat)
    *others, _ = ways  # the last one is ours
    for i, name in enumerate(others):
        show(f"select, {name} / ours", seconds[:, [i, -1]], (name, "ours"))


@torch.no_grad()
def part_sparse(args, device):
    """Compare sparse with dense matrices on the CPU, in fp32 and bf16, for random masks.

    A mask is of single weights, or of blocks. Where ONNX Runtime is installed, the dense matrices
    are timed there, too, in fp32 and int8.
    """
    cpu = torch.device("cpu")
    dense = Bert(BertConfig(**SHAPES[args.shape]), "classifier", 2, mlm=False)
    dense.eval().requires_grad_(False)
    try:
        others = deploy.in_onnx_runtime(dense)
    except UserError as error:
        others = []
        print(f"sparse, without ONNX Runtime: {error}")
    for side, density in itertools.product((1, SIDE), (0.1, 0.03)):
        thin = copy.deepcopy(dense)
        for linear in encoder_linears(thin):
            blocks = squares(linear.weight, side)
            blocks *= torch.rand_like(blocks[:, :1, :, :1]) < density
        kept = f"blocks of {side} x {side}" if side > 1 else "single weights"
        title = f"sparse, {args.shape}, {kept} at density {density}"
        print(f"{title}: {sparse(thin)} matrices are sparse")
        for size in (1, 8, 32):
            for length in (32, 128):
                batch = inputs(synthetic(length, size), cpu)
                deploy.speed(dense, thin, batch, cpu, args.repeat, others)


def part_trainer(args, device):
    """Compare steps on RTE with those of `transformers.Trainer` that fine-tunes the same model.

    A batch has 32 examples, padded to the longest. In a round each program does a few steps.
    """
    dataset = load_dataset(get_task("rte"), "train", tokenizer_of(args), 256, args.data_dir)
    for dtype in args.dtypes:
        steps = {name: our_step(name, args.shape, device, dtype) for name in ("dense", "smp-s")}
        rounds = []
        for _ in range(args.repeat):
            theirs = pace_of_trainer(dataset, args.shape, device, dtype)
            rounds.append([theirs, *[pace_of(step, dataset, device) for step in steps.values()]])
        seconds = np.array(rounds)  # (repeat, 3)
        for i, name in enumerate(steps, 1):
            title = f"trainer, rte, transformers.Trainer / {name}, {dtype}"
            show(title, seconds[:, [0, i]], ("Trainer", name))


TRAINER_STEPS = 10  # in a round; the first two do not count
TRAINER_PACKAGES = ("transformers", "accelerate")
TRAINER_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def pace_of(step, dataset, device):
    """Return the seconds that one of our steps takes on a data set, with making the batch."""
    seconds = []
    for rows in some_batches(dataset, TRAINER_STEPS):
        seconds.append(clock(lambda rows=rows: step(dataset.collate(rows)), device))
    return np.mean(seconds[2:])


def pace_of_trainer(dataset, shape, device, dtype):
    """Return the seconds that a step of `transformers.Trainer` takes on a data set."""
    import transformers

    ends = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    def collate(rows):
        batch = dataset.collate(np.array(rows))
        return {name: batch[name] for name in TRAINER_INPUTS}

    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPES[shape]))
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=TRAINER_STEPS,
            per_device_train_batch_size=BATCH,
            bf16=dtype == "bf16",
            fp16=dtype == "fp16",
            use_cpu=device.type == "cpu",
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
        )
        trainer = transformers.Trainer(
            model, options, collate, train_dataset=range(len(dataset)), callbacks=[Watch()]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return (ends[-1] - ends[1]) / (len(ends) - 2)


COST_SIZES = ((64, 128), (32, 40))  # examples in a batch, and tokens of each


def part_cost(args, device):
    """Print what a step of each method costs on a GPU: counted without one, see tools/cost.py."""
    gpu = cost.Device(1e12 * args.tflops, 1e12 * args.bandwidth, 1e-6 * args.launch)
    dtype = args.dtypes[-1]
    shape = args.cost_shape
    print(
        f"cost, {shape}, {dtype}: {args.tflops:g} TFLOP/s, {args.bandwidth:g} TB/s, "
        f"{args.launch:g} us a kernel; mean of ten steps in the ramp\n"
        "columns: ms of a step, over dense, GB moved, kernels, ms of each part;\n"
        "beyond dense: bytes (B) for each weight of the encoder's matrices, and kernels"
    )
    columns = "".join(f"{part:>12}" for part in cost.PARTS)
    for size, length in COST_SIZES:
        print(f"{size} x {length:<10} {'ms':>8} {'ratio':>7} {'GB':>7} {'kernels':>8}{columns}")
        dense = bill_of_step("dense", shape, dtype, size, length)
        for name in args.methods or CRITERIA:
            bill = bill_of_step(name, shape, dtype, size, length)
            seconds = bill.seconds(gpu)
            kernels, moved, _ = bill.total()
            parts = "".join(f"{1e3 * bill.seconds(gpu, part):12.3f}" for part in cost.PARTS)
            more_kernels = kernels - dense.total()[0]
            more_bytes = (moved - dense.total()[1]) / bill.weights
            print(
                f"{name:15} {1e3 * seconds:8.3f} {seconds / dense.seconds(gpu):7.3f} "
                f"{moved / 1e9:7.2f} {kernels:8.0f}{parts}"
                f"   beyond dense: {more_bytes:.1f} B, {more_kernels:.0f} kernels",
                flush=True,
            )


def bill_of_step(name, shape, dtype, size, length, steps=10):
    """Return the `cost.Bill` of a step of `size` examples, the mean of `steps`.

    A window of PINS has ten steps, and its weights are ranked in one of them.
    """
    meta = torch.device("meta")
    with cost.as_on_cuda(DTYPES[dtype], steps) as counter:
        batch = {key: tensor.to(meta) for key, tensor in synthetic(length, size).items()}
        step = our_step(name, shape, meta, dtype, counter.mark)
        step(batch)  # in which AdamW makes its averages
        counter.bill = cost.Bill(steps, weights_of_encoder(BertConfig(**SHAPES[shape])))
        for _ in range(steps):
            step(batch)
    return counter.bill


def weights_of_encoder(config):
    """Return the number of weights of the matrices that methods prune."""
    width = config.hidden_size
    return (4 * width * width + 2 * width * config.intermediate_size) * config.num_hidden_layers


PARTS = {
    "cost": part_cost,
    "step": part_step,
    "throughput": part_throughput,
    "select": part_select,
    "sparse": part_sparse,
    "trainer": part_trainer,
}
WITH_DATA = ("throughput", "trainer")

# ---------- the command line ----------------------------------------------------------------------


def parse(argv):
    parser = Parser(__doc__)
    parser.prog = "python -m tools.bench"
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {' '.join(PARTS)}; default all")
    add("--shape", choices=tuple(SHAPES), help="default base for cost and on a GPU, else minilm")
    add("--tokenizer", help="a folder with tokenizer.json, for real lengths; default the demo")
    add("--data-dir", metavar="DIR", help="folder of the GLUE files, for throughput and trainer")
    text = "for cost and step; default all for cost, smp-l smp-s movement pins for step"
    add("--methods", nargs="+", metavar="METHOD", choices=tuple(CRITERIA), help=text)
    text = "step takes each, the other parts the last one; default fp32 bf16"
    both = ["fp32", "bf16"]
    add("--dtypes", nargs="+", metavar="DTYPE", default=both, choices=tuple(DTYPES), help=text)
    add("--tflops", type=POSITIVE, default=600, help="of the GPU of cost, in bf16; default 600")
    add("--bandwidth", type=POSITIVE, default=2.8, help="of its memory, in TB/s; default 2.8")
    add("--launch", type=POSITIVE, default=2.5, help="its shortest kernel, in us; default 2.5")
    add("--repeat", type=COUNT, default=7, help="alternating runs per ratio; default 7")
    add("--device", default="auto", choices=DEVICES)
    return parser.parse_args(argv)


@program
def main(argv=None):
    args = parse(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        raise UserError(f"{' '.join(unknown)}: no such part; there are {' '.join(PARTS)}")
    device = pick_device(args.device)
    args.cost_shape = args.shape or "base"
    if args.shape is None:
        args.shape = "base" if device.type == "cuda" else "minilm"
    threads = f"{torch.get_num_threads()} threads"
    print(f"{device}, {threads}, torch {torch.__version__}, shape {args.shape}")
    for name in args.parts or PARTS:
        if name in WITH_DATA and not args.data_dir:
            print(f"{name}: left out, needs --data-dir")
        elif name == "trainer" and not all(find_spec(package) for package in TRAINER_PACKAGES):
            print(f"{name}: left out, needs {' and '.join(TRAINER_PACKAGES)}")
        else:
            PARTS[name](args, device)


if __name__ == "__main__":
    sys.exit(main())
