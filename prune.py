"""Which weights a layer sees: masked layers, mask functions, straight-through gradients, one small class per method.

Papers: SMP, Jiang et al., ACL 2023, arXiv 2210.06210 ("Pruning Pre-trained Language Models Without Fine-Tuning");
movement pruning, Sanh, Wolf, Rush, NeurIPS 2020, arXiv 2005.07683; PINS, Ren and Zhu, Findings of ACL 2023, arXiv
2305.12394; PLATON, Zhang et al., ICML 2022, arXiv 2206.12562. Their symbols, once, and our words for them: W or theta
`weight`, S `scores`, M or m `mask`, v `density` (the fraction kept), T `total_steps`, lambda `penalty`, R the
regulariser, g `grad`, eta `lr`, I `importance`.

A method is a class with the few calls of `Dense`; train.py makes them and knows no formula. Step t: forward with the
masks of `update(t)`, backward, `penalise(t)`, clip, `observe(t)`, the optimizer, `update(t + 1)`, for evaluation too.
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
# What a pattern keeps or drops as one block: rows of every letter but the last, with columns of the last.
TIED = {"unit": ("UD",), "head": ("QKVO", "UD")}


def n_of_m(pattern):
    """(n, m) of the pattern "n:m", (0, 1) of any other."""
    n, _, m = pattern.partition(":")
    return (int(n), int(m)) if m else (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# schedules: pure functions of the step


def cubic_at(step, first, last, start, end):
    """`first` until step `start`, `last` from step `end`, between them last + (first - last)(1 - (t - start)/(end -
    start))^3: the density of every method (1 to v), soft movement's tau (0 to 0.1), SMP's lambda (0 to 400).

    1.0 |***
        |   *
        |    **
      v |      **********
        0  start  end    T
    """
    if step <= start:
        return first
    if step >= end:
        return last
    return last + (first - last) * (1 - (step - start) / (end - start)) ** 3


# ---------------------------------------------------------------------------------------------------------------------
# exact selection, without a sort of the whole


def kth_largest(scores, k):
    """The k-th largest value (1 <= k <= n) of a flat float32 array, exactly.

    Floyd and Rivest (1975): a sample brackets the value, one pass counts what lies at or above the bracket's high end,
    and only the few strictly inside are partitioned. Invariant: at_or_above < k <= at_or_above + inside.size, else the
    value is an end of the bracket (a plateau: many equal scores) or, where the sample misled, anything.
    """
    n = scores.size
    sample = np.sort(scores[::61])  # prime: no stride of a matrix's columns falls in step with it
    rank, spread = (1 - k / n) * sample.size, 2 + 3 * math.sqrt(sample.size * k / n * (1 - k / n))  # 3 sigma
    low, high = math.floor(rank - spread), math.ceil(rank + spread)
    low = sample[low] if low >= 0 else -np.inf
    high = sample[high] if high < sample.size else np.inf
    inside = scores[(scores > low) & (scores < high)]
    place = inside.size - (k - np.count_nonzero(scores >= high))
    if 0 <= place < inside.size:
        return np.partition(inside, place)[place]
    end = high if place >= inside.size else low
    if np.count_nonzero(scores > end) < k <= np.count_nonzero(scores >= end):
        return end
    return np.partition(scores, n - k)[n - k]


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


def threshold_at(values, k):
    """The k-th largest of a flat tensor, a 0-dim tensor; without a host sync on an accelerator."""
    if values.is_cpu:
        return torch.tensor(kth_largest(values.numpy(), k))
    return kth_largest_on_device(values[None], torch.full((1, 1), k, device=values.device))[0, 0]


def top_k_masks(scores, k):
    """For each of L matrices of one shape the bool mask of its k[l] largest scores: exactly so many under any ties,
    among equals the first in row-major order. `k`: L numbers, rounded down, or a tensor of them on the device. NaN and
    infinity: ValueError on a CPU; elsewhere a look would be a host sync, and the loop stops at the loss."""
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
    if not math.isfinite(flat.sum()):
        raise ValueError("NaN or infinity among the scores: they have no order to keep the largest by")
    threshold = kth_largest(flat, k)
    mask = flat >= threshold
    surplus = np.count_nonzero(mask) - k
    if surplus:
        mask[np.flatnonzero(flat == threshold)[-surplus:]] = False
    return torch.from_numpy(mask).view(scores.shape)


def n_of_m_mask(scores, density, m):
    """(out, in) bool: of every m neighbours along the input dimension the density * m largest, among equals the first.
    Where that is not whole, some groups keep one more: those whose next score is largest, so that the density is exact.
    """
    values = scores.detach().unflatten(1, (-1, m))  # (out, in / m, m)
    group, rank = values.unbind(2), []  # a score's rank, by how many of its group beat it: faster than sorting
    for i, score in enumerate(group):
        rank.append(sum((other >= score if j < i else other > score).char() for j, other in enumerate(group) if j != i))
    rank = torch.stack(rank, dim=2)
    n = math.floor(density * m + 1e-9)
    mask, more = rank < n, int(density * scores.numel()) - n * group[0].numel()
    if more > 0:
        following = torch.where(rank == n, values, 0.0).sum(2)  # (out, in / m): the next score of each group
        mask |= (rank == n) & top_k_masks([following], [more])[0][..., None]
    return mask.flatten(1)


def block_values(scores, count):
    """(count,) from matrices that have `count` blocks of rows each and, in the last of them, of columns: the mean over
    all of a block's scores, in float64 (see SMPShared)."""
    *rows, last = (s if s.is_mps else s.double() for s in scores)
    parts = [s.unflatten(0, (count, -1)).sum((1, 2)) for s in rows] + [last.unflatten(1, (count, -1)).sum((0, 2))]
    return (sum(parts) / (sum(s.numel() for s in scores) / count)).float()


# ---------------------------------------------------------------------------------------------------------------------
# the masked layer


class StraightThrough(torch.autograd.Function):
    """W' = W * M; backward dL/dW = dL/dW' * M, and for the scores as if dM/dS were 1: dL/dS = dL/dW' * W, so that the
    scores of pruned weights keep moving."""

    @staticmethod
    def forward(ctx, scores, weight, mask, dtype):
        ctx.save_for_backward(weight, mask)
        return (weight * mask).to(dtype)  # four times as fast as torch.where on a CPU

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        for_scores = grad * weight if ctx.needs_input_grad[0] else None
        for_weight = grad.to(weight.dtype) * mask if ctx.needs_input_grad[1] else None
        return for_scores, for_weight, None, None


class MaskedLinear(nn.Linear):
    """A linear layer whose forward uses weight * mask. `scores` (out, in) float32 start at `first`; None: there are
    none. The mask starts with everything kept."""

    def __init__(self, linear, first=0.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scores = None if first is None else nn.Parameter(torch.full_like(linear.weight, first))
        self.register_buffer("mask", torch.ones_like(linear.weight, dtype=torch.bool), persistent=False)

    def masked_weight(self, dtype):
        """(out, in) in `dtype`, as the layer multiplies by it."""
        return StraightThrough.apply(self.scores, self.weight, self.mask, dtype)

    def forward(self, x):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return F.linear(x, self.masked_weight(dtype), self.bias)  # (..., in) x (in, out) -> (..., out)


class HardConcreteLinear(MaskedLinear):
    """L0's layer: a gate in [0, 1], drawn in training, with a true gradient (Louizos et al. 2018; movement code):

    s = sigmoid((log u - log(1 - u) + S) / b) in training, sigmoid(S) in evaluation; M = clamp(1.2 s - 0.1, 0, 1)
    """

    temperature = 2 / 3  # b

    def __init__(self, linear, first):
        super().__init__(linear, first)
        self.register_buffer("noise", torch.zeros_like(linear.weight), persistent=False)  # log u - log(1 - u)

    def gate(self, training=False):
        s = torch.sigmoid((self.noise + self.scores) / self.temperature if training else self.scores)
        return (1.2 * s - 0.1).clamp(0, 1)

    def masked_weight(self, dtype):
        return (self.gate(self.training) * self.weight).to(dtype)


def encoder_matrices(layers):
    """{letter: [(parent module, child's name) of that matrix in each layer]}: the six of each layer, counted."""
    found = {letter: [] for letter in MATRICES}
    for layer in layers:
        for letter, name in MATRICES.items():
            parent, _, child = name.rpartition(".")
            parent = layer.get_submodule(parent)
            linear = parent.get_submodule(child)
            assert type(linear) is nn.Linear, f"{name} is {type(linear).__name__}: masked twice?"
            found[letter].append((parent, child))
    assert sum(map(len, found.values())) == 6 * len(layers)
    return found


def mask_layers(layers, kind=MaskedLinear, first=0.0):
    """Put a MaskedLinear in place of the six matrices of each layer; {letter: [one per layer]}."""
    masked = encoder_matrices(layers)
    for places in masked.values():
        for i, (parent, child) in enumerate(places):
            places[i] = kind(parent.get_submodule(child), first)
            parent.add_module(child, places[i])
    return masked


def masked_linears(model):
    """{name: MaskedLinear} of a model's masked layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


@torch.no_grad()
def baked_state(model):
    """The state dict with the masks applied and the scores left out: what any BERT can load."""
    state, training = model.state_dict(), model.training
    model.eval()
    for name, module in masked_linears(model).items():
        state[f"{name}.weight"] = module.masked_weight(module.weight.dtype) + 0.0  # -0.0 becomes 0.0
        state.pop(f"{name}.scores", None)
    model.train(training)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# methods


def add_penalty(linears, weight, shift=0.0):
    """R = mean over matrices of mean(sigmoid(S - shift)) (code; the papers write sums), returned; adds the gradient of
    weight * R in closed form: dR/dS = s (1 - s) / (numel * matrices). `weight`: a number or a 0-dim tensor."""
    means = []
    for linear in linears:
        gate = torch.sigmoid(linear.scores - shift if shift else linear.scores)
        means.append(gate.mean())
        slope = torch.addcmul(gate, gate, gate, value=-1)  # s - s^2
        linear.scores.grad.add_(slope.mul_(weight / (gate.numel() * len(linears))))
    return torch.stack(means).mean()


class Dense:
    """Plain fine-tuning of every weight; the baseline, the teacher of others, and the calls that every method has."""

    head = "classifier"
    top_k = False  # are the largest scores kept, at a density? Then in patterns too, and at other densities afterwards

    def __init__(self, model, settings, total_steps):
        self.model, self.settings, self.total_steps = model, settings, total_steps
        self.start = settings.hold * total_steps  # the density falls from this step
        self.end = self.start + settings.ramp * total_steps  # to this one

    def groups(self):
        """Parameter groups for the optimizer; biases, LayerNorms (Devlin et al., released code) and scores (SMP,
        movement: code) are not decayed."""
        s, named = self.settings, [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        scores = [p for n, p in named if n.endswith(".scores")]
        decayed = [p for n, p in named if p.dim() > 1 and not n.endswith(".scores")]
        groups = [
            {"params": decayed, "lr": s.lr, "weight_decay": s.weight_decay},
            {"params": [p for _, p in named if p.dim() == 1], "lr": s.lr, "weight_decay": 0.0},
            {"params": scores, "lr": s.score_lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def update(self, step):
        """Make the masks of step `step`, from the scores as they are."""

    def penalise(self, step):
        """Add the gradient of lambda_t * R to that of the scores; returns R (a tensor, unweighted) or 0."""
        return 0.0

    def observe(self, step, lr):
        """See the gradients of step `step` as the optimizer is about to: whole, unscaled, clipped."""

    def density(self, step):
        """The density asked for at `step`."""
        return cubic_at(step, 1.0, self.settings.density, self.start, self.end)

    def settled(self, step):
        """Is the density after `step` steps the final one, so that a result may be chosen here?"""
        return True

    def achieved(self):
        """The fraction of the encoder matrices' weights that is kept, counted."""
        return 1.0

    def scores(self):
        """{name: tensor} of the scores and masks, for a file."""
        return {}

    def state(self):
        """{name: tensor} of what the next step needs besides the parameters, for a checkpoint, which fills them."""
        return {}


class Movement(Dense):
    """MvP, hard movement pruning: each matrix keeps its int(v * numel) largest scores S; S and W are both learned.

    With the straight-through gradient, S = -lr * sum_t (dL/dW') * W: high where a weight moves away from zero.
    """

    frozen = "bert.embeddings"  # Sanh et al., code
    layer, first, top_k = MaskedLinear, 0.0, True

    def __init__(self, model, settings, total_steps):
        super().__init__(model, settings, total_steps)
        model.get_submodule(self.frozen).requires_grad_(False)
        self.masked = mask_layers(model.bert.encoder["layer"], self.layer, self.first)
        self.linears = [linear for column in self.masked.values() for linear in column]

    def settled(self, step):
        return step >= self.end

    def rank(self, linear):
        """The values of which the largest are kept."""
        return linear.scores

    def shares(self, density):
        """The density of each matrix, in the order of `self.linears`."""
        return [density] * len(self.linears)

    @torch.no_grad()
    def update(self, step):
        density, pattern, columns = self.density(step), self.settings.pattern, dict(self.masked)
        n, m = n_of_m(pattern)
        if n:
            for linear in self.linears:
                linear.mask.copy_(n_of_m_mask(self.rank(linear), density, m))
            return
        layers, shares = len(columns["Q"]), self.shares(density)
        shares = {letter: shares[i * layers : (i + 1) * layers] for i, letter in enumerate(columns)}
        for letters in TIED.get(pattern, ()):
            blocks = list(zip(*(columns.pop(letter) for letter in letters), strict=True))  # L tuples of linears
            count = self.model.config.num_attention_heads if "Q" in letters else blocks[0][0].out_features
            k = [count * sum(s) / len(s) for s in zip(*(shares[letter] for letter in letters), strict=True)]
            values = [block_values([self.rank(linear) for linear in linears], count) for linears in blocks]
            for (*rows, last), mask in zip(blocks, top_k_masks(values, k), strict=True):
                for linear in rows:
                    linear.mask.copy_(mask.repeat_interleave(linear.out_features // count)[:, None])  # (out, 1)
                last.mask.copy_(mask.repeat_interleave(last.in_features // count))  # (in,)
        for letter, column in columns.items():
            k = [share * linear.weight.numel() for share, linear in zip(shares[letter], column, strict=True)]
            masks = top_k_masks([self.rank(linear) for linear in column], k)
            for linear, mask in zip(column, masks, strict=True):
                linear.mask.copy_(mask)

    @torch.no_grad()
    def kept(self):
        """The number of weights the masks keep, a tensor."""
        return torch.stack([linear.mask.sum() for linear in self.linears]).sum()

    def achieved(self):
        return int(self.kept()) / sum(linear.weight.numel() for linear in self.linears)

    def scores(self):
        modules = masked_linears(self.model)
        assert len(modules) == len(self.linears)
        scores = {f"{name}.scores": m.scores.detach() for name, m in modules.items() if m.scores is not None}
        return scores | {f"{name}.mask": m.mask for name, m in modules.items()}


class Magnitude(Movement):
    """MaP, magnitude pruning: each matrix keeps its int(v * numel) largest |W|; what is masked gets no gradient."""

    first = None

    def rank(self, linear):
        return linear.weight.abs()


class SMPLocal(Movement):
    """SMP-L: freeze everything, learn S; each matrix keeps its int(v * numel) largest scores."""

    head = "words"
    frozen = ""  # the whole model

    @torch.no_grad()
    def penalise(self, step):
        # lambda_t = lambda (1 - (1 - t/T)^3) over ALL steps (SMP, code; the paper's saturates with the density)
        weight = cubic_at(step, 0.0, self.settings.reg_lambda, 0, self.total_steps)
        return add_penalty(self.linears, weight)


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


class SoftMovement(Movement):
    """SMvP, soft movement pruning: M = sigmoid(S) > tau, one tau for all matrices, rising from 0 to 0.1; the penalty
    lambda * tau / 0.1 * R pushes scores below it. The density is what comes out or, with a density asked for, what
    lambda is steered to (`steer`)."""

    threshold = 0.1  # tau
    shift, top_k = 0.0, False

    def tau(self, step):
        return cubic_at(step, 0.0, self.threshold, self.start, self.end)

    def settled(self, step):
        target = self.settings.density
        return step >= self.end and (target is None or abs(self.achieved() / target - 1) <= 0.1)

    @torch.no_grad()
    def update(self, step):
        for column in self.masked.values():
            k = []
            for linear in column:  # at least 0.5% of a matrix stay
                above = (torch.sigmoid(linear.scores) > self.tau(step)).sum()
                k.append(above.clamp(min=int(0.005 * linear.weight.numel()) + 1))
            for linear, mask in zip(column, top_k_masks([m.scores for m in column], k), strict=True):
                linear.mask.copy_(mask)

    @torch.no_grad()
    def penalise(self, step):
        weight = self.settings.reg_lambda * self.tau(step) / self.threshold
        return add_penalty(self.linears, self.steer(step, weight), self.shift)

    def steer(self, step, weight):
        """lambda: the published `weight` or, with a density asked for, that times sinh(40 e), e = log(kept / asked for)
        at this step: up to 74 times, either way, where the density is off by an eighth. Ends within 3% (measured)."""
        if self.settings.density is None:
            return weight
        error = (self.kept() / (self.density(step) * sum(linear.weight.numel() for linear in self.linears))).log()
        return weight * (40 * error).clamp(-5, 5).sinh()


class L0(SoftMovement):
    """L0 regularisation with the hard concrete gate: M is not binary and its gradient is true.

    R = mean over matrices of mean(sigmoid(S - b log(0.1/1.1))), the probability that a gate is not zero.
    """

    layer, first = HardConcreteLinear, 2.197  # sigmoid(2.197) = 0.9
    shift = HardConcreteLinear.temperature * math.log(0.1 / 1.1)

    def tau(self, step):
        return self.threshold  # lambda is constant

    @torch.no_grad()
    def update(self, step):
        generator = torch.Generator(self.linears[0].weight.device)
        generator.manual_seed(self.settings.seed * 1_000_003 + step)  # the same on every rank, and after a resume
        for linear in self.linears:
            linear.noise.uniform_(1e-4, 1 - 1e-4, generator=generator).logit_()
            linear.mask.copy_(linear.gate() > 0)


class Pins(Dense):
    """PINS: every few steps zero, over all encoder matrices at once, the weights of least importance; train them all.

    The 0-1 ILP. A gradient step under a mask m gives m (theta - eta g); to first order the loss changes by
        g . (m (theta - eta g) - theta) = sum_i m_i g_i (theta_i - eta g_i) - g . theta,
    linear in m, the last term constant. Subject to sum_i m_i = k, m_i in {0, 1}, it is least where m keeps the k
    smallest g (theta - eta g), that is the k largest of
        I = -theta g + eta g^2,
    since exchanging a kept i for a dropped j with I_j > I_i would lower it. That is `signed`. It drops first what it
    says lowers the loss most, the large theta g > 0, far outside the range of a first-order model; and a zeroed weight,
    I = eta g^2 >= 0, returns before them. `absolute` (the release) is the ILP of least damage: pruning changes the loss
    by sum_i (1 - m_i) I_i, at most sum_i (1 - m_i) |I_i|, and keeping the k largest |I| makes this bound least.
    """

    def __init__(self, model, settings, total_steps):
        super().__init__(model, settings, total_steps)
        places = encoder_matrices(model.bert.encoder["layer"])
        self.weights = [parent.get_submodule(child).weight for column in places.values() for parent, child in column]
        self.sizes = [weight.numel() for weight in self.weights]
        # flat, over all matrices: the mean over the window, its moving average, and the average deviation from that
        self.window, self.ema, self.unc = torch.zeros(3, sum(self.sizes), device=self.weights[0].device)
        self.mask = None  # what is kept; None: nothing is to be zeroed after this step

    def settled(self, step):
        return step - 1 > self.end

    def criterion(self, weight, grad, lr):
        value = (lr * grad - weight) * grad
        return value.abs() if self.settings.pins_score == "absolute" else value

    def importance(self):
        return self.ema * self.unc

    @torch.no_grad()
    def observe(self, step, lr):
        s, place = self.settings, step % self.settings.pins_window
        if place == 0:
            self.ema.lerp_(self.window, 1 - s.beta1)
            self.unc.lerp_((self.window - self.ema).abs_(), 1 - s.beta2)
        for weight, mean in zip(self.weights, self.window.split(self.sizes), strict=True):
            value = self.criterion(weight, weight.grad, lr)
            value.nan_to_num_(0.0, 0.0, 0.0)  # fp16: a step that the scaler is about to skip
            mean.lerp_(value.flatten(), 1 / (place + 1))  # (out, in) -> (numel,)
        if step > self.end or (step > self.start and place == 0):
            # everything strictly below the int(N (1 - v))-th smallest goes: one more than k stay (code)
            importance = self.importance()
            below = int(importance.numel() * (1 - self.density(step)))
            self.mask = importance >= threshold_at(importance, importance.numel() - below + 1) if below else None

    @torch.no_grad()
    def update(self, step):
        if self.mask is not None:
            for weight, mask in zip(self.weights, self.mask.split(self.sizes), strict=True):
                weight.mul_(mask.view_as(weight)).add_(0.0)  # (numel,) -> (out, in); -0.0 becomes 0.0
        self.mask = None

    @torch.no_grad()
    def achieved(self):
        return int(torch.stack([w.count_nonzero() for w in self.weights]).sum()) / sum(self.sizes)

    def state(self):
        return {"window": self.window, "ema": self.ema, "uncertainty": self.unc}


class Platon(Pins):
    """PLATON: I = |theta g|, the change of the loss if a weight were zero; else as PINS, which took its averages."""

    def criterion(self, weight, grad, lr):
        return (weight * grad).abs_()


class Sensitivity(Platon):
    """|theta g| alone: the mean over the last whole window (beta1 0 in its recipe), no uncertainty."""

    def importance(self):
        return self.ema


METHODS = {
    "dense": Dense,
    "magnitude": Magnitude,
    "l0": L0,
    "movement": Movement,
    "soft-movement": SoftMovement,
    "smp-l": SMPLocal,
    "smp-s": SMPShared,
    "sensitivity": Sensitivity,
    "platon": Platon,
    "pins": Pins,
}


# ---------------------------------------------------------------------------------------------------------------------
# teachers


def distill(task_loss, student, teacher, temperature=2.0, share=0.5):
    """Per example (B,): 0.5 * task + 0.5 * T^2 * KL(p_teacher || p_student), T = 2 (SMP, code; the paper swaps the KL).

    `student` and `teacher` are logits (B, K).
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    p_teacher = F.softmax(teacher / temperature, dim=1)
    kl = F.kl_div(log_student, p_teacher, reduction="none").sum(dim=1)  # (B, K) -> (B,)
    return (1 - share) * task_loss + share * temperature**2 * kl


def self_distill(task_loss, student, teacher, temperature=2.0):
    """PINS's self-regularisation, per example (B,): (1 - a) * task + a * T^2 * CE(p_teacher, p_student at T), T = 2,
    with a = 1 - H(p_student) / log K, the student's own confidence, at temperature 1 and without gradient (PINS, code).
    """
    p = F.softmax(student.detach(), dim=1)
    a = 1 - torch.special.entr(p).sum(dim=1) / math.log(student.size(1))  # (B, K) -> (B,)
    ce = F.cross_entropy(student / temperature, F.softmax(teacher / temperature, dim=1), reduction="none")
    return (1 - a) * task_loss + a * temperature**2 * ce
