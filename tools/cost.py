"""What a training step costs on a GPU, counted without one.

`bill` runs a step of BERT on tensors of the device "meta". They have a shape and a type, but no
values, so any machine can do it, at once. Each operation is billed: the kernels that CUDA starts
for it, the bytes that they read and write, and the floating-point operations of its products. The
figures are exact counts: they are the same on every run and on every machine.

The predicted time of an operation is the longest of three: its kernels at `launch` seconds each,
its bytes at `bandwidth`, and its floating-point operations at `rate`. That of a step is their sum.

What the model leaves out:
- Caches. Every kernel reads from memory and writes to it, also what the kernel before has left in
  the second-level cache. So small tensors look dearer than they are.
- The host. It prepares one kernel while another runs. A step that is short on the device is as
  long as Python takes to ask for it.
- How well a kernel uses the device. A product of small matrices is slower than `rate` says.
- Work on tensors of the CPU, copies from the host, and memory that is allocated.
"""

import contextlib
import math
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch.optim import optimizer as torch_optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils as torch_foreach
from torch.utils._python_dispatch import TorchDispatchMode

PARTS = ("forward", "backward", "regulariser", "optimizer", "masks")
SECTOR = 32  # bytes: what the memory of a GPU delivers at least, for a value at a random place


@dataclass(frozen=True)
class Device:
    """A GPU. The defaults are of an H100 as it is seen in practice, not of its data sheet."""

    rate: float = 600e12  # floating-point operations a second in a product in bf16
    bandwidth: float = 2.8e12  # bytes a second
    launch: float = 2.5e-6  # seconds that the shortest kernel takes


@dataclass
class Item:
    """What one operation costs, or the sum of several."""

    kernels: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other):
        kernels = self.kernels + other.kernels
        return Item(kernels, self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, device):
        launches = self.kernels * device.launch
        return max(launches, self.bytes / device.bandwidth, self.flops / device.rate)


@dataclass
class Bill:
    """The items of `steps` steps, by part of the step and by operation."""

    steps: int
    weights: int = 0  # of the matrices that are pruned
    items: dict = field(default_factory=dict)  # {(part, operation): [Item]}

    def select(self, part=None):
        """Return the items of one part, or of all."""
        return [i for (p, _), items in self.items.items() if part in (None, p) for i in items]

    def total(self, part=None):
        """Return (kernels, bytes, flops) of a step, the mean of `steps`."""
        total = sum(self.select(part), Item())
        return total.kernels / self.steps, total.bytes / self.steps, total.flops / self.steps

    def seconds(self, device, part=None):
        return sum(item.seconds(device) for item in self.select(part)) / self.steps


# ---------- the price of an operation -------------------------------------------------------------
#
# Most operations are one kernel that reads each input once and writes each output once. The others
# stand here. The sources are the files of PyTorch's aten/src/ATen/native/cuda, as of torch 2.13.


def size_of(tensor):
    """Return the bytes of a tensor in memory. A dimension that is only expanded counts once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride()):
        if stride != 0:
            count *= length
    return count * tensor.element_size()


def tensors_in(values):
    """Return the tensors among the arguments or results of an operation, in lists, too."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def whole(tensors):
    """Return the bytes of the tensors. One that is given twice, as in x * x, counts once."""
    sizes = {}
    for t in tensors:
        place = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride())
        sizes[place] = size_of(t)
    return sum(sizes.values())


# no kernel: memory without a value, and other views of a tensor
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
FREE |= {"detach", "_record_function_enter_new", "_record_function_exit"}
ONLY_WRITES = {"copy_", "fill_", "zero_", "uniform_", "random_", "normal_", "bernoulli_"}


def sort_price(inputs, outputs):
    """SortStable.cu and Sort.cpp; CUB sorts 8 bits in a pass that reads and writes all pairs."""
    values = inputs[0]
    rows = values.numel() // values.size(-1)
    count = values.numel()
    key = values.element_size()
    passes = key  # of 8 bits each
    if values.size(-1) <= 4096:  # one block sorts a row in shared memory
        copies = 2 * key + 8  # the values, and the indices 0, 1, 2, ...
        return Item(4, count * (copies + 2 * (key + 8)))
    radix = key + passes * 2 * (key + 8)  # a histogram, then the passes; the indices are int64
    if rows == 1 or values.size(-1) >= 1_000_000:
        return Item(1 + rows * (passes + 2), 8 * values.size(-1) + count * radix)
    if rows < 128:  # by value all rows together, then by row: 8 bits of int64, and the values anew
        by_row = 8 + 2 * 8
        return Item(passes + 7, count * (8 + radix + by_row + 12 + key + 8))
    return Item(passes + 3, count * (8 + radix + passes * key))  # a histogram in each pass


def nonzero_static_price(inputs, outputs):
    """Nonzero.cu: the mask is read to count and again to write; then the rest is filled."""
    return Item(4, 2 * size_of(inputs[0]) + 2 * size_of(outputs[0]))


def lookup_price(inputs, outputs):
    """A kernel that reads single values, each at the place that an index says."""
    return Item(1, whole(inputs[1:]) + SECTOR * outputs[0].numel() + size_of(outputs[0]))


def scatter_price(inputs, outputs):
    """In place: each index reads and writes one sector, and reads its value, if it has its own."""
    target, *others = inputs
    index = next(t for t in others if t.dtype == torch.long)
    return Item(1, whole(others) + 2 * SECTOR * index.numel())


def embedding_price(inputs, outputs):
    """Rows are long enough to be read without waste."""
    return Item(1, size_of(inputs[1]) + 2 * size_of(outputs[0]))


def embedding_backward_price(inputs, outputs):
    """Embedding.cu: the gradient is filled with 0; from 3,073 tokens on they are sorted."""
    grad, ids = inputs[:2]
    kernels = 2 if ids.numel() <= 3072 else 14
    return Item(kernels, size_of(outputs[0]) + 3 * size_of(grad) + 8 * size_of(ids))


def layer_norm_backward_price(inputs, outputs):
    """layer_norm_kernel.cu: one kernel for the input's gradient, one or two for the others."""
    grad, x = inputs[:2]
    read = size_of(grad) + size_of(x)
    trained = len(outputs) > 1  # weight and bias
    return Item(1 + 2 * trained, read * (1 + trained) + whole(outputs))


def many_tensors_price(lists, read, written):
    """MultiTensorApply.cuh: a kernel takes so many tensors, and 320 blocks of 65,536 values."""
    most = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}[lists]

    def price(inputs, outputs, tensors):
        blocks = sum(math.ceil(t.numel() / 65536) for t in tensors)
        kernels = max(math.ceil(blocks / 320), math.ceil(len(tensors) / most))
        return Item(kernels, (read + written) * whole(tensors))

    return price


SPECIAL = dict.fromkeys(("index", "index_select", "gather"), lookup_price)
SPECIAL |= dict.fromkeys(("scatter_", "index_add_", "index_put_"), scatter_price)
SPECIAL |= {
    "sort": sort_price,
    "nonzero_static": nonzero_static_price,
    "embedding": embedding_price,
    "embedding_dense_backward": embedding_backward_price,
    "native_layer_norm_backward": layer_norm_backward_price,
}
OF_MANY = {  # operations on lists of tensors: (lists that are passed, reads, writes) of each value
    "_foreach_norm": many_tensors_price(1, 1, 0),
    "_foreach_mul_": many_tensors_price(1, 1, 1),
    "_foreach_add_": many_tensors_price(1, 1, 1),
    "_fused_adamw_": many_tensors_price(4, 4, 3),  # w, g, m, v; it writes w, m, v
}


def flops_of(name, inputs, outputs):
    """Return the floating-point operations of a product: two for each value it multiplies."""
    if name in ("mm", "bmm"):
        return 2 * outputs[0].numel() * inputs[0].size(-1)
    if name in ("addmm", "baddbmm"):
        return 2 * outputs[0].numel() * inputs[1].size(-1)
    return 0


def price(operation, args, kwargs, result):
    """Return the Item of one operation, or None if it starts no kernel."""
    name = operation.overloadpacket.__name__
    outputs = tensors_in([result])
    inputs = tensors_in(args)
    if operation.is_view or name in FREE or not (inputs or outputs):
        return None
    if name in OF_MANY:
        return OF_MANY[name](inputs, outputs, tensors_in(args[:1]))
    if name in SPECIAL:
        return SPECIAL[name](inputs, outputs)
    written = tensors_in([kwargs["out"]]) if "out" in kwargs else outputs
    if name in ONLY_WRITES:
        inputs = inputs[1:]  # the first is the target
    return Item(1, whole(inputs) + whole(written), flops_of(name, inputs, outputs))


# ---------- what CUDA does, and "meta" does not ---------------------------------------------------


class Attention(torch.autograd.Function):
    """F.scaled_dot_product_attention as one fused kernel each way, without values.

    The table of probabilities is never written. So the backward kernel computes it anew: five
    products, where the forward kernel has two.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask):
        mixed = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, mixed)
        ctx.products = q.numel() * k.size(-2)  # (B, H, R, D) x (B, H, D, T)
        sums = 4 * q.numel() // q.size(-1)  # one number per row, in fp32
        moved = whole([q, k, v, mask, mixed]) + sums
        Counter.add("attention", Item(1, moved, 2 * 2 * ctx.products))
        return mixed

    @staticmethod
    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in tensors[:3]]
        moved = whole([*tensors, grad, *grads])
        Counter.add("attention backward", Item(2, moved, 5 * 2 * ctx.products))
        return *grads, None


class Emulation(TorchFunctionMode):
    """Autocast to `dtype` of torch.float32 or a shorter type, one-kernel dropout and attention."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.casting = False  # in a block of torch.autocast

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear and self.casting:
            args = [None if t is None else t.to(self.dtype) for t in args]
        if function in (F.layer_norm, F.cross_entropy):  # autocast has them in fp32
            args = [args[0].float(), *args[1:]]
        if function is F.dropout:
            return self.dropout(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            return Attention.apply(*args[:4])
        return function(*args, **kwargs)

    def dropout(self, x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, True)[0] if training and p > 0 else x

    @contextlib.contextmanager
    def autocast(self, device, dtype):
        """Stand in for torch.autocast."""
        self.casting = True
        yield
        self.casting = False


class CPUGenerator(torch.Generator):
    """A generator that takes any device, because "meta" has none."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


class Counter(TorchDispatchMode):
    """It sees every operation, also those of the backward pass, and bills it to `part`."""

    current = None  # the counter that `Attention` adds to

    def __init__(self, steps):
        super().__init__()
        self.bill = Bill(steps)
        self.part = None  # None: not billed

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        item = price(operation, args, kwargs, result)
        if item is not None:
            self.add(operation.overloadpacket.__name__, item)
        return result

    @classmethod
    def add(cls, name, item):
        counter = cls.current
        if counter.part is not None:
            counter.bill.items.setdefault((counter.part, name), []).append(item)

    def mark(self, part):
        self.part = part


@contextlib.contextmanager
def as_on_cuda(dtype, steps):
    """Give a `Counter`, inside an `Emulation`; the optimizer and clipping work on lists."""
    counter = Counter(steps)
    emulation = Emulation(dtype)
    supported = {"return_value": ["meta"]}
    with contextlib.ExitStack() as stack:

        def replace(owner, name, **how):
            stack.enter_context(mock.patch.object(owner, name, **how))

        replace(Counter, "current", new=counter)
        replace(torch, "Generator", new=CPUGenerator)
        replace(torch_foreach, "_get_foreach_kernels_supported_devices", **supported)
        replace(torch_optimizer, "_get_fused_kernels_supported_devices", **supported)
        replace(torch, "autocast", new=emulation.autocast)
        replace(torch, "is_autocast_enabled", new=lambda device: emulation.casting)
        replace(torch, "get_autocast_dtype", new=lambda device: dtype)
        stack.enter_context(counter)
        stack.enter_context(emulation)
        yield counter
