"""The machine: its devices and data types, and the processes that share a run."""

import os
import platform
import subprocess
import sys
from contextlib import nullcontext, suppress
from datetime import timedelta

import numpy as np
import safetensors
import tokenizers
import torch
import torch.distributed as dist

from support.terminal import ROOT, UserError

# ---------- devices and data types ----------------------------------------------------------------

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "fp32", "bf16", "fp16")


def pick_device(name):
    """Return the torch.device for "auto", "cpu", "cuda" or "mps".

    Raises UserError where this machine does not have it.
    """
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = [device for device in found if found[device]][0]
    if not found[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    if name == "cuda":
        # cuDNN's attention makes a plan for each new shape, and rounds dropout in torch 2.11
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def pick_dtype(device):
    """Return "bf16" where the device multiplies in it, else "fp16" on GPUs and "fp32" elsewhere.

    GPUs tell it themselves. Those that only emulate bf16 are slow in it. A CPU multiplies in bf16
    if it has AVX512-BF16 or AMX.
    """
    if device.type == "cuda":
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if real else "fp16"
    can = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not tell: {}
    able = can.get("avx512_bf16") or can.get("amx_bf16")
    return "bf16" if device.type == "cpu" and able else "fp32"


def autocast(device, dtype):
    """Return the autocast context for `dtype`, which is "fp32", "bf16" or "fp16"."""
    if dtype == "fp32":
        return nullcontext()
    half = torch.bfloat16 if dtype == "bf16" else torch.float16
    return torch.autocast(device.type, half)


def store_frozen(model, kept_in, dtype):
    """Keep the frozen matrices of a model in bf16, if `kept_in` is "bf16" and not "fp32".

    A run in bf16 multiplies by the same numbers then. The rounded embeddings are read as float32.
    Raises UserError where a run computes in another `dtype`.
    """
    if kept_in == "fp32":
        return
    if dtype != "bf16":
        raise UserError(f"--frozen-dtype {kept_in}: the run computes in {dtype}; give --dtype bf16")
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data = parameter.data.clone()  # a part of the file would hold all of it
        elif not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def send(tensor, device):
    """Return the tensor on the device.

    A copy to CUDA starts from pinned memory and waits for nothing. No step reads anything back, so
    the next batch is made and sent while the device computes.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def inputs(batch, device):
    """Return the three inputs of the model, (B, T) each, on the device."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: send(batch[name], device) for name in names}


# ---------- processes -----------------------------------------------------------------------------


def join_processes(device_name):
    """Return (rank, world size, device) of this process, after it has joined the others.

    Tensors on a CPU travel by gloo, and those on GPUs by nccl. The processes wait for each other
    for three hours, because the first one on a machine may have to download and tokenise.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise UserError("WORLD_SIZE is set, but not by torchrun: use torchrun, or unset it")
    rank = int(os.environ["RANK"]) if world > 1 else 0
    device = pick_device(device_name)
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    return rank, world, device


def rank_and_world():
    """Return (rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_rank_0(data, rank, world):
    """Return the bytes `data` of rank 0 on every rank, so that machines need no shared disk."""
    if world == 1:
        return data
    size = torch.tensor(len(data))
    dist.broadcast(size, 0)
    received = torch.zeros(int(size), dtype=torch.uint8)
    if rank == 0:
        received = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    for part in received.split(1 << 28):
        dist.broadcast(part, 0)
    return received.numpy().tobytes()


# ---------- what a run says of its machine --------------------------------------------------------


def peak_memory(device):
    """Return the bytes that tensors took at most on CUDA, and the process elsewhere; 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def surroundings():
    """Return what config.json of a run folder says of the program and the machine."""
    versions = {m.__name__: m.__version__ for m in (torch, np, tokenizers, safetensors)}
    return {
        "git_commit": git_commit(),
        "threads": torch.get_num_threads(),
        "versions": versions | {"python": platform.python_version()},
        "platform": platform.platform(),
    }


def git_commit():
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.TimeoutExpired):  # there is no git, or it hangs
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
        return done.stdout.strip() or None
