"""Which weights a layer sees: masked layers, mask functions, straight-through gradients, one small class per method.

Papers: SMP, Jiang et al., ACL 2023, arXiv 2210.06210 ("Pruning Pre-trained Language Models Without Fine-Tuning");
movement pruning, Sanh, Wolf, Rush, NeurIPS 2020, arXiv 2005.07683. Their symbols, once, and our words for them:
W `weight`, S `scores`, M `mask`, v `density` (the fraction kept), N the steps of the ramp, T `total_steps`,
lambda `penalty`, R the regulariser.

A method is a class with `head`, `groups`, `update`, `penalise` and `scores`; train.py calls these and knows no formula.
Masks are computed once per optimizer step: `update(t)` before step t, and again after it for step t+1 and evaluation.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# The six matrices of a layer, and nothing else: the papers' letters and the layer's names for them.
MATRICES = {
    "Q": "attention.self.query",
    "K": "attention.self.key",
    "V": "attention.self.value",
    "O": "attention.output.dense",
    "U": "intermediate.dense",
    "D": "output.dense",
}

# ---------------------------------------------------------------------------------------------------------------------
# schedules: pure functions of the step


def density_at(step, final, ramp_steps):
    """Cubic, no warm-up (SMP, code): v_t = v + (1 - v)(1 - t/N)^3 for t < N, then v.

    1.0 |*
        | *
        |   **
      v |      **********
        0      N        T
    """
    if step >= ramp_steps:
        return final
    return final + (1 - final) * (1 - step / ramp_steps) ** 3


def penalty_at(step, final, total_steps):
    """lambda_t = lambda * (1 - (1 - t/T)^3) over ALL steps (SMP, code; the paper's saturates with the density at N)."""
    return final * (1 - (1 - step / total_steps) ** 3)


# ---------------------------------------------------------------------------------------------------------------------
# exact selection, without a sort of the whole


def kth_largest(scores, k):
    """The k-th largest value (1 <= k <= n) of a flat float32 array, exactly.

    Floyd and Rivest (1975): a sample brackets the value, one pass counts what lies above the bracket, and only the few
    inside are partitioned. A bracket that missed (the counts tell) means one partition of everything.
    """
    n = scores.size
    sample = np.sort(scores[::61])  # prime: no stride of a matrix's columns falls in step with it
    rank, spread = (1 - k / n) * sample.size, 2 + 3 * math.sqrt(sample.size * k / n * (1 - k / n))  # 3 sigma
    low, high = math.floor(rank - spread), math.ceil(rank + spread)
    low = sample[low] if low >= 0 else -np.inf
    high = sample[high] if high < sample.size else np.inf
    above = np.count_nonzero(scores > high)
    inside = scores[(scores >= low) & (scores <= high)]
    if not above < k <= above + inside.size:
        above, inside = 0, scores
    place = inside.size - (k - above)
    return np.partition(inside, place)[place]


def kth_largest_on_device(scores, k):
    """The same for each row of `scores` (L, n) with its own `k` (L, 1), both on an accelerator: (L, 1), no host sync.
    Bisection on the bits: a float's bits, the negative ones turned round, are an integer in the same order."""
    keys = scores.view(torch.int32)
    keys = torch.where(keys < 0, ~keys | torch.iinfo(torch.int32).min, keys)  # -0.0 becomes -1, just below 0.0
    low = torch.where((keys >= 0).sum(1, keepdim=True) >= k, 0, torch.iinfo(torch.int32).min)  # the sign, then 31 bits
    for bit in range(30, -1, -1):
        middle = low + (1 << bit)
        low = torch.where((keys >= middle).sum(1, keepdim=True) >= k, middle, low)
    return torch.where(keys == low, scores, -math.inf).amax(1, keepdim=True)


def top_k_masks(scores, k):
    """For each of L matrices of one shape the bool mask of its k[l] largest scores: exactly so many under any ties,
    among equals the first in row-major order. `k`: L numbers, rounded down, or a tensor of them on the device. NaN is
    in no order and must not come here."""
    if scores[0].is_cpu:
        return [top_k_mask(s, int(number)) for s, number in zip(scores, k, strict=True)]
    flat = torch.stack(list(scores)).detach().flatten(1)  # (L, out, in) -> (L, numel)
    k = [x.long() if torch.is_tensor(x) else torch.full((), int(x), device=flat.device) for x in k]
    k = torch.stack(k).unsqueeze(1)  # (L, 1)
    threshold = kth_largest_on_device(flat, k.clamp(min=1))
    masks, ties = flat > threshold, flat == threshold
    masks |= ties & (ties.cumsum(1, dtype=torch.int32) <= k - masks.sum(1, keepdim=True))
    return (masks & (k > 0)).unflatten(1, scores[0].shape).unbind()


def top_k_mask(scores, k):
    """`top_k_masks` of one matrix on the CPU."""
    if k in (0, scores.numel()):
        return torch.full_like(scores, bool(k), dtype=torch.bool)
    flat = scores.detach().numpy().reshape(-1)  # (out, in) -> (numel,)
    threshold = kth_largest(flat, k)
    mask = flat >= threshold
    surplus = np.count_nonzero(mask) - k
    if surplus:
        mask[np.flatnonzero(flat == threshold)[-surplus:]] = False
    return torch.from_numpy(mask).view(scores.shape)


# ---------------------------------------------------------------------------------------------------------------------
# the masked layer


class StraightThrough(torch.autograd.Function):
    """W' = W * M; backward as if dM/dS were 1: dL/dS = dL/dW' * W, so that scores of pruned weights keep moving."""

    @staticmethod
    def forward(ctx, scores, weight, mask, dtype):
        ctx.save_for_backward(weight)
        return torch.where(mask, weight, 0.0).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad * weight, None, None, None


class MaskedLinear(nn.Linear):
    """A linear layer whose forward uses weight * mask. `scores` (out, in) float32 start at 0: all ties, all kept."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scores = nn.Parameter(torch.zeros_like(linear.weight))
        self.register_buffer("mask", torch.ones_like(linear.weight, dtype=torch.bool), persistent=False)

    def forward(self, x):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        weight = StraightThrough.apply(self.scores, self.weight, self.mask, dtype)
        return F.linear(x, weight, self.bias)  # (..., in) x (in, out) -> (..., out)


def mask_layers(layers):
    """Put a MaskedLinear in place of the six matrices of each layer; {letter: [one per layer]}."""
    masked = {letter: [] for letter in MATRICES}
    for layer in layers:
        for letter, name in MATRICES.items():
            parent, _, child = name.rpartition(".")
            parent = layer.get_submodule(parent)
            linear = parent.get_submodule(child)
            assert type(linear) is nn.Linear, f"{name} is {type(linear).__name__}: masked twice?"
            parent.add_module(child, MaskedLinear(linear))
            masked[letter].append(parent.get_submodule(child))
    assert sum(map(len, masked.values())) == 6 * len(layers)
    return masked


def baked_state(model):
    """The state dict with the masks applied and the scores left out: what any BERT can load."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear):
            state[f"{name}.weight"] = torch.where(module.mask, module.weight, 0.0)
            del state[f"{name}.scores"]
    return state


# ---------------------------------------------------------------------------------------------------------------------
# methods


class Dense:
    """Plain fine-tuning of every weight; the baseline, and the teacher of others."""

    head = "classifier"

    def __init__(self, model, settings, total_steps):
        self.model, self.settings, self.total_steps = model, settings, total_steps

    def groups(self):
        """Parameter groups for the optimizer; biases and LayerNorms are not decayed (Devlin et al., released code)."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        decayed = [p for name, p in named if p.dim() > 1]
        others = [p for name, p in named if p.dim() == 1]
        s = self.settings
        return [
            {"params": decayed, "lr": s.lr, "weight_decay": s.weight_decay},
            {"params": others, "lr": s.lr, "weight_decay": 0.0},
        ]

    def update(self, step):
        """Make the masks of step `step`, from the scores as they are."""

    def penalise(self, step):
        """Add the gradient of lambda_t * R to that of the scores; returns R (a tensor, unweighted) or 0."""
        return 0.0

    def density(self, step):
        """The density asked for at `step`."""
        return 1.0

    def achieved(self):
        """The fraction of the masked matrices' weights that the masks keep, counted."""
        return 1.0

    def scores(self):
        """{name: tensor} of the scores and masks, for a file."""
        return {}


class SMPLocal(Dense):
    """SMP-L: freeze everything, learn S; each matrix keeps its int(v * numel) largest scores."""

    head = "words"

    def __init__(self, model, settings, total_steps):
        super().__init__(model, settings, total_steps)
        model.requires_grad_(False)
        self.masked = mask_layers(model.bert.encoder["layer"])
        self.linears = [linear for column in self.masked.values() for linear in column]
        self.ramp_steps = settings.ramp * total_steps

    def groups(self):
        """Adam on S alone, no decay: AdamW at weight decay 0 (SMP, code)."""
        return [{"params": [m.scores for m in self.linears], "lr": self.settings.score_lr, "weight_decay": 0.0}]

    def density(self, step):
        return density_at(step, self.settings.density, self.ramp_steps)

    def shares(self, density):
        """The density of each matrix, in the order of `self.linears`."""
        return [density] * len(self.linears)

    @torch.no_grad()
    def update(self, step):
        shares = iter(self.shares(self.density(step)))
        for column in self.masked.values():
            k = [next(shares) * linear.weight.numel() for linear in column]
            for linear, mask in zip(column, top_k_masks([m.scores for m in column], k), strict=True):
                linear.mask.copy_(mask)

    @torch.no_grad()
    def penalise(self, step):
        """R = mean over matrices of mean(sigmoid(S)) (SMP, code; the paper writes a sum). Its gradient in closed form:
        dR/dS = sigmoid(S)(1 - sigmoid(S)) / (numel * matrices)."""
        weight = penalty_at(step, self.settings.reg_lambda, self.total_steps)
        means = []
        for linear in self.linears:
            gate = torch.sigmoid(linear.scores)
            means.append(gate.mean())
            slope = torch.addcmul(gate, gate, gate, value=-1)  # s - s^2
            linear.scores.grad.add_(slope, alpha=weight / (gate.numel() * len(self.linears)))
        return torch.stack(means).mean()

    @torch.no_grad()
    def achieved(self):
        kept = sum(int(linear.mask.sum()) for linear in self.linears)
        return kept / sum(linear.weight.numel() for linear in self.linears)

    def scores(self):
        modules = [(n, m) for n, m in self.model.named_modules() if isinstance(m, MaskedLinear)]
        assert len(modules) == len(self.linears)
        scores = {f"{name}.scores": m.scores.detach() for name, m in modules}
        return scores | {f"{name}.mask": m.mask for name, m in modules}


class SMPShared(SMPLocal):
    """SMP-S: the L matrices of a type share its budget by how large their scores are.

    v_l = v * L * r_l / sum_l' r_l', with r = mean(sigmoid(S/p)); p is in the released code only.
    """

    def shares(self, density):
        # in float64 (which MPS lacks): the order of summation, hence the number of threads, cannot move a count
        wide = torch.float32 if self.linears[0].scores.is_mps else torch.float64
        r = [torch.sigmoid(m.scores / self.settings.temperature_s).mean(dtype=wide) for m in self.linears]
        r = torch.stack(r).view(len(MATRICES), -1)  # (6, L)
        shares = share_out(r, density, self.settings.redistribute).flatten()  # (6L,), as self.linears
        return shares.tolist() if shares.is_cpu else shares


def share_out(r, density, redistribute=True):
    """Densities (types, L) proportional to r (types, L) in each row, with mean `density`.

    The released code neither caps nor redistributes: a share above 1 is lost, and the density got falls below the one
    asked for. With `redistribute`, what a full matrix cannot take goes to the others of its row in proportion.
    """
    layers = r.size(1)
    shares = density * layers * r / r.sum(dim=1, keepdim=True)
    if redistribute:
        for _ in range(layers - 1):  # each round fills at least one matrix of a row or changes nothing
            full = shares >= 1
            rest = density * layers - full.sum(dim=1, keepdim=True)  # to share among those not yet full
            open_r = torch.where(full, 0.0, r)
            total = open_r.sum(dim=1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)
            shares = torch.where(full, 1.0, rest * open_r / total)
    return shares.clamp(max=1.0)


METHODS = {"dense": Dense, "smp-l": SMPLocal, "smp-s": SMPShared}


# ---------------------------------------------------------------------------------------------------------------------
# distillation


def distill(task_loss, student, teacher, temperature=2.0, share=0.5):
    """Per example (B,): 0.5 * task + 0.5 * T^2 * KL(p_teacher || p_student), T = 2 (SMP, code; the paper swaps the KL).

    `student` and `teacher` are logits (B, K).
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    p_teacher = F.softmax(teacher / temperature, dim=1)
    kl = F.kl_div(log_student, p_teacher, reduction="none").sum(dim=1)  # (B, K) -> (B,)
    return (1 - share) * task_loss + share * temperature**2 * kl
