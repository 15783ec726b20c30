"""How long a function takes, for tools/deploy.py and tools/bench.py."""

import time

import numpy as np
import torch


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
