"""Run train.train on CUDA, or on tensors that only claim to be there, and watch its steps.

A build of torch without CUDA can make fake tensors (FakeTensorMode). They have a shape, a dtype and
the device "cuda", but no values. `train.train` runs on them unchanged, to its end. As on a GPU, an
operation on tensors of two devices raises. From the first log line on, a step raises where the host
would have to wait for the device. Log lines, evaluations and checkpoints may wait.

Where there is a GPU, the same runs take place on it, and torch itself watches the steps.

test_cuda.py starts `main` in a process of its own. `LIBRARY` must be loaded before torch.
"""

import contextlib
import functools
import io
import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import prune
import train
from kinds import KINDS, classify, generate
from models import checkpoint, resume, runs, teacher
from support import machine, selection, tensors, terminal

ROOT = Path(train.__file__).parent

# -------------------------------------------------------------------------------------------------
# the library

# Python can replace what torch.cuda answers. Autograd asks in C++, and a build without CUDA raises.
# - Around each operation of a backward pass it asks a guard for the device and the stream. The
#   guard in FakeGuardImpl.h does nothing but remember both. It comes with torch, for its tests.
# - At the start of a backward pass it asks hooks whether CUDA is there and in use.
LIBRARY = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

using FakeGuard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard);

namespace at {
struct CUDAHooks final : CUDAHooksInterface {  // torch looks for a class of this name
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
"""


def build_library(compiler, folder):
    """Compile `LIBRARY` into the folder, and return the path. It takes some seconds."""
    torch_folder = Path(torch.__file__).parent
    lib = torch_folder / "lib"
    path = folder / "fake_cuda.so"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-xc++", "-", "-o", str(path)]
    command += [f"-I{torch_folder}/include", f"-L{lib}", f"-Wl,-rpath,{lib}"]
    command += ["-lc10", "-ltorch_cpu"]
    subprocess.run(command, input=LIBRARY, text=True, check=True)
    return path


# -------------------------------------------------------------------------------------------------
# the devices


class HostWaits(Exception):
    """In a step the host would wait for the device."""


class FakeDevice(TorchDispatchMode):
    """It sees each operation on fake tensors, and raises `HostWaits` while it watches a step.

    Outside of steps, a value that the host reads is 1 or False, because there is none.
    FakeTensorMode itself raises at any time for tensors of two devices, and for a result whose size
    depends on values.
    """

    watching = False
    waits = 0  # how often the host waited so far

    def watch(self, on):
        self.watching = on

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        if name == "is_pinned":
            return False
        if name == "_pin_memory":
            pinned = args[0].clone()
            pinned.was_pinned = True  # for `check_copy`
            return pinned
        if name == "_local_scalar_dense":  # float(), int(), bool() and item()
            self.forbid("the host reads a value")
            if args[0].dtype == torch.bool:
                return False  # "may a mask be wrong?"
            return 1.0 if args[0].is_floating_point() else 1
        if name == "_to_copy" and "device" in kwargs:
            self.check_copy(args[0], kwargs["device"], kwargs.get("non_blocking", False))
        if name == "copy_":
            target, source, *non_blocking = args
            self.check_copy(source, target.device, any(non_blocking))
        if name in ("index", "index_put", "index_put_"):
            self.check_indices(*args[:3])
        return operation(*args, **kwargs)

    def check_copy(self, source, device, non_blocking):
        kinds = (source.device.type, torch.device(device).type)
        pinned = hasattr(source, "was_pinned")
        if kinds == ("cuda", "cpu"):
            self.forbid("a copy to the host")
        if kinds == ("cpu", "cuda") and not (pinned and non_blocking):
            self.forbid("a copy from the host without pinned memory and non_blocking")

    def check_indices(self, target, indices, values=None):
        for index in indices:
            if index is None:
                continue
            self.check_copy(index, target.device, non_blocking=False)  # torch makes this copy
            if index.dtype == torch.bool and (values is None or values.numel() > 1):
                self.forbid("the host reads how many places a mask chooses")

    def forbid(self, what):
        self.waits += 1
        if self.watching:
            raise HostWaits(what)


class RealDevice:
    """The GPU. While it watches a step, torch raises where the host would wait."""

    def watch(self, on):
        torch.cuda.set_sync_debug_mode("error" if on else "default")


class CPUGenerator(torch.Generator):
    """A generator of random numbers that takes any device, because a GPU's own needs CUDA."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@contextlib.contextmanager
def fake_device():
    """Give a `FakeDevice`, and let the Python part of torch and the program believe in it."""
    with contextlib.ExitStack() as stack:

        def replace(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value))

        replace(torch.cuda, "is_available", lambda: True)
        replace(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        replace(torch, "Generator", CPUGenerator)
        # A new tensor is never, not even for a moment, a real one on the device.
        replace(FakeTensorMode, "avoid_device_init", True)
        # Weights are read from files as real tensors. Fake ones have neither bytes nor values.
        for owner in (runs, train):
            replace(owner, "load_model", without_fakes(checkpoint.load_model))
        for owner in (tensors, teacher):
            replace(owner, "as_safetensors", lambda *args: [])
        for kind in KINDS.values():
            replace(kind, "predictions", no_predictions)
        # Where a text ends depends on its tokens, which have no values.
        replace(generate.Generate, "predict", lambda self, model, part, *args: [""] * len(part))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        device = stack.enter_context(FakeDevice())
        replace(classify, "MAX_TOKENS", {"cuda": 600})  # so that a split has several batches
        replace(classify.Classify, "logits", waiting_once(classify.Classify.logits, device))
        yield device


def without_fakes(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return wrapped


def waiting_once(function, device):
    """Return Classify.logits with a check: for all batches together the host waits once."""

    @functools.wraps(function)
    def checked(*args):
        before = device.waits
        logits = function(*args)
        assert device.waits == before + 1, f"logits: the host waits {device.waits - before} times"
        return logits

    return checked


def no_predictions(kind, logits, dataset):
    """Stand in for `predictions` of a kind, which reads the logits."""
    assert logits.device.type == "cpu"
    assert logits.dtype == torch.float32
    if kind.name == "span":
        return [""] * len(dataset.examples)
    if kind.name == "tag":
        return [["O"] * len(words) for words, _ in dataset.examples]
    return np.zeros(len(logits))


# -------------------------------------------------------------------------------------------------
# faults, to show that they are caught


def masks_by_counts_on_cpu(values, counts):
    """Do what prune.top_k_masks does, with counts that somebody forgot on the CPU."""
    return selection.top_k_masks(values, torch.ones(len(counts)))


def penalty_as_float(method, step, penalise=prune.SMPLocal.penalise):
    return float(penalise(method, step))


def send_unpinned(tensor, device):
    return tensor.to(device)


FAULTS = {
    "a count on the CPU": (prune, "top_k_masks", masks_by_counts_on_cpu),
    "a float() of the regulariser": (prune.SMPLocal, "penalise", penalty_as_float),
    "an unpinned batch": (machine, "send", send_unpinned),
}

# -------------------------------------------------------------------------------------------------
# the runs


def train_and_watch(flags, device):
    """Run train.train with the flags. Raises where a step makes the host wait.

    The device is watched from the end of the first log line on, but not in what may wait.
    """

    def pausing(function, then_watch):
        @functools.wraps(function)
        def paused(*args):
            device.watch(False)
            result = function(*args)
            device.watch(then_watch)
            return result

        return paused

    def check_and_finish(run):
        check_state(run)
        return finish(run)

    finish = train.finish
    settings = train.settings_from(terminal.parse_settings(train.Settings, "", flags))
    with contextlib.ExitStack() as stack:
        # After an evaluation `save_progress` follows, and both need the sum of the losses.
        may_wait = {"log_step": True, "evaluate_step": False, "save_progress": True}
        for name, then_watch in may_wait.items():
            paused = pausing(getattr(train, name), then_watch)
            stack.enter_context(mock.patch.object(train, name, paused))
        paused = pausing(check_and_finish, then_watch=False)
        stack.enter_context(mock.patch.object(train, "finish", paused))
        stack.callback(device.watch, False)
        train.train(settings, "")


def check_state(run):
    """Check that the optimizer is fused, and that all that a run remembers is on the device."""
    assert all(group["fused"] for group in run.optimizer.param_groups), "AdamW is not fused"
    tensors = resume.remembered(run) | dict(run.model.named_parameters())
    tensors |= dict(run.model.named_buffers()) | {"loss_sum": run.loss_sum}
    if run.kind.teaches_beside and run.teacher.table:
        tensors |= run.teacher.table.state_dict()
    elif run.teacher.table is not None:
        tensors["teacher"] = run.teacher.table
    elsewhere = [name for name, tensor in tensors.items() if tensor.device.type != "cuda"]
    assert not elsewhere, f"not on the device: {elsewhere}"


def describe(error):
    """Return the error with the last line of the program, but for support/, that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    folders = (ROOT, ROOT / "kinds", ROOT / "models")
    ours = [frame for frame in frames if Path(frame.filename).parent in folders]
    text = f"{type(error).__name__}: {error}"
    if ours:
        text = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}: {ours[-1].line}: {text}"
    return text


def main():
    """Read {case: [flags, a fault or null]} of a file. Print [case, error or null], a line each."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    for case, (flags, fault) in cases.items():
        with contextlib.ExitStack() as stack:
            if fault:
                stack.enter_context(mock.patch.object(*FAULTS[fault]))
            out = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            # so that also the small matrices of a test are selected in the way of large ones
            stack.enter_context(mock.patch.object(selection, "SMALL", 0))
            real = torch.cuda.is_available()
            device = RealDevice() if real else stack.enter_context(fake_device())
            error = None
            try:
                train_and_watch([*flags, "--out", out, "--device", "cuda"], device)
            except Exception as raised:
                error = describe(raised)
        print(json.dumps([case, error]), flush=True)
