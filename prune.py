"""How weights are masked: masked layers, mask functions, and one small class per method.

The papers:
- SMP: Jiang et al., ACL 2023, arXiv 2210.06210
- movement pruning: Sanh, Wolf, Rush, NeurIPS 2020, arXiv 2005.07683
- PINS: Ren and Zhu, Findings of ACL 2023, arXiv 2305.12394
- PLATON: Zhang et al., ICML 2022, arXiv 2206.12562

Their symbols and our words: W or theta `weight`, S `scores`, M or m `mask`, v `density` (the
fraction kept), T `total_steps`, lambda `strength`, R the regulariser, g `grad`, eta `lr`,
I `importance`. A weight is (out, in). The *peers* of a matrix are the same in each of L layers.

A method is a class with the functions of `Dense`. train.py calls them and knows no formula.
Step t is: forward with the masks of `update(t)`, backward, `penalise(t)`, clip, `observe(t)`,
the optimizer, `update(t + 1)`. Evaluation sees the masks of `update(t + 1)`, too.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from support.matrices import as_one, by_shape, encoder_linears, encoder_matrices
from support.matrices import in_float32, lay_side_by_side, widest
from support.patterns import check_density, keep_pattern
from support.schedules import cubic_at
from support.selection import top_k_masks

# ---------- the masked layer ----------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """W' = W * M, where the gradient treats dM/dS as 1.

    dL/dW = dL/dW' * M, and dL/dS = dL/dW' * W. The scores of pruned weights keep moving.
    W' has autocast's data type, such as bf16, in which the layer multiplies. Gradients are float32.
    """

    @staticmethod
    def forward(ctx, scores, weight, mask):  # `scores` is here to get a gradient; it may be None
        ctx.save_for_backward(weight, mask)
        device = weight.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # in one pass; four times as fast as torch.where on a CPU
        return torch.mul(weight, mask, out=torch.empty_like(weight, dtype=dtype))

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        for_scores = grad * in_float32(weight) if ctx.needs_input_grad[0] else None
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = torch.mul(grad, mask, out=torch.empty_like(weight))
        return for_scores, for_weight, None


class MaskedLinear(nn.Linear):
    """A linear layer that multiplies by weight * mask, both (out, in). The mask starts at ones.

    The scores start at `initial`; with `initial=None` there are none.
    """

    def __init__(self, linear, initial=0.0):
        # On "meta" nothing is allocated, because weight and bias are replaced at once.
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scores = None
        if initial is not None:
            self.scores = nn.Parameter(torch.full_like(linear.weight, initial))
        mask = torch.ones_like(linear.weight, dtype=torch.bool)
        self.register_buffer("mask", mask, persistent=False)

    def masked_weight(self):
        """Return (out, in), as the layer multiplies by it."""
        return StraightThrough.apply(self.scores, self.weight, self.mask)

    def forward(self, x):
        return F.linear(x, self.masked_weight(), self.bias)  # (..., in) -> (..., out)


def mask_matrices(model, Layer=MaskedLinear, initial=0.0):
    """Put a masked layer in place of every matrix; return {letter: [L masked layers]}."""
    masked = encoder_matrices(model)
    for letter, peers in masked.items():
        for i, linear in enumerate(peers):
            assert type(linear) is nn.Linear, f"{letter} of layer {i} is masked twice"
            peers[i] = Layer(linear, initial)
            model.layers[i].set_submodule(model.matrices[letter], peers[i])
    return masked


def masked_linears(model):
    """Return {name: MaskedLinear} of a model's masked layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedLinear)}


# ---------- SMP: the mask function, the shares of SMP-S, the regulariser --------------------------


def keep_largest(linears, values, counts):
    """Make the masks of B `linears`: M is 1 for the `counts[l]` largest of `values[l]`, else 0.

    `values` is (B, out, in) and `counts` (B). Return whether a mask may be wrong: `top_k_masks`.
    """
    masks, wrong = top_k_masks(values, counts)
    for linear, mask in zip(linears, masks):
        linear.mask = mask
    return wrong


def share_out(r, density, redistribute=True):
    """Return densities (6, L): in each row proportional to `r` (6, L), with mean `density`.

    v_l = v * L * r_l / sum_l' r_l'. A share above 1 is cut. The released code loses the rest. With
    `redistribute` the other matrices of the row get it in proportion.
    """
    layers = r.size(1)
    shares = density * layers * r / r.sum(1, keepdim=True)
    if redistribute:
        for _ in range(layers - 1):  # each round fills a matrix of a row, or changes nothing
            full = shares >= 1
            rest = density * layers - full.sum(1, keepdim=True)  # for those not yet full
            open_r = torch.where(full, 0.0, r)
            total = open_r.sum(1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)
            shares = torch.where(full, 1.0, rest * open_r / total)
    return torch.where(shares > 0.999999999, 1.0, shares)  # rounding may miss 1


def add_penalty(linears, strength, shift=0.0, sigmoids=()):
    """Add the gradient of strength * R to that of the scores; return R.

    R = mean over matrices of mean(s), s = sigmoid(S - shift) (released code; papers: sums).
    dR/dS = s (1 - s) / (numel * matrices). `sigmoids` are the s of `by_shape(linears)`, if known.
    """
    means = []
    strength = torch.ones((), device=linears[0].scores.device) * strength
    for stack, s in itertools.zip_longest(by_shape(linears), sigmoids):
        if s is None:
            scores = as_one([linear.scores for linear in stack])  # (B, out, in)
            s = torch.sigmoid(scores - shift if shift else scores)
        means.append(s.mean((1, 2)))
        slopes = torch.addcmul(s, s, s, value=-1)  # s - s^2
        share = 1 / (s[0].numel() * len(linears))
        for linear, slope in zip(stack, slopes):
            linear.scores.grad.addcmul_(slope, strength, value=share)
    return torch.cat(means).mean()


# ---------- methods -------------------------------------------------------------------------------


class Dense:
    """Plain fine-tuning of every weight, and the functions that train.py calls of every method."""

    recipe = "dense"  # the name of its published settings in support/recipes.py
    uses = ()  # the settings that only some methods use; others are refused
    output_head = "classifier"  # or "words": the label words, without a new weight
    top_k = False  # the density alone tells how many weights stay; then patterns are possible, too
    masks = False  # weights that are not kept are remembered, and can come back
    first = 1.0  # the density at which the ramp starts
    wrong = False  # or a tensor: may a mask of this or an earlier step be wrong?
    skips = False  # fp16: the scaler skips a step whose gradients are not finite

    def __init__(self, model, settings, total_steps):
        self.model = model
        self.settings = settings
        self.total_steps = total_steps
        self.start = settings.hold * total_steps  # the density falls from this step
        self.end = self.start + settings.ramp * total_steps  # to this one
        self.power = getattr(settings, "ramp_power", 3)  # older runs do not say it
        self.freeze()

    def freeze(self):
        """Make constant what the method does not train."""

    def groups(self):
        """Return the parameter groups. Vectors and scores have no weight decay (released code)."""
        s = self.settings
        named = list(self.model.named_parameters())
        scores = [p for name, p in named if name.endswith(".scores")]
        others = [p for name, p in named if p.requires_grad and not name.endswith(".scores")]
        matrices = [p for p in others if p.dim() > 1]
        vectors = [p for p in others if p.dim() <= 1]
        groups = [
            {"params": matrices, "lr": s.lr, "weight_decay": s.weight_decay},
            {"params": vectors, "lr": s.lr, "weight_decay": 0.0},
            {"params": scores, "lr": s.score_lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def keep_zeros(self, model):
        """Let what is 0 in `model`, the run to start from, stay 0, if weights have no masks."""

    def update(self, step):
        """Make the masks of step `step` from the scores as they are."""

    def penalise(self, step):
        """Add the gradient of lambda_t * R to that of the scores; return R, or 0 without R."""
        return 0.0

    def observe(self, step, lr):
        """Look at the clipped gradients of the whole batch, before the optimizer's step."""

    def density(self, step):
        """Return the density asked for at `step`."""
        return cubic_at(step, self.first, self.settings.density, self.start, self.end, self.power)

    def settled(self, step):
        """Is the density after `step` steps the final one? The best is chosen among such steps."""
        return True

    def achieved(self):
        """Return the fraction of the matrices' weights that is kept, counted."""
        return 1.0

    def tensors(self):
        """Return {name: tensor} of the scores and masks, for a file."""
        return {}

    def state(self):
        """Return {name: tensor} of what a checkpoint must hold besides the parameters."""
        return {}


class Masked(Dense):
    """A method with masks: a matrix keeps the int(v * numel) weights of largest `rank`."""

    uses = ("density", "pattern", "hold", "ramp", "ramp_power", "frozen_dtype")
    layer = MaskedLinear
    initial = 0.0  # value of the scores at the start; None: there are none
    top_k = True
    masks = True

    def __init__(self, model, settings, total_steps):
        super().__init__(model, settings, total_steps)
        self.masked = mask_matrices(model, self.layer, self.initial)  # {letter: [L layers]}
        self.linears = [linear for peers in self.masked.values() for linear in peers]
        self.size = sum(linear.weight.numel() for linear in self.linears)
        self.stacks = by_shape(self.linears)
        for linears in self.stacks:
            lay_side_by_side(linears)
        if self.top_k:
            check_density(self)

    def settled(self, step):
        return step >= self.end

    def rank(self, linear):
        """Return the values (out, in) of which the largest are kept."""
        return linear.scores

    def shares(self, density):
        """Return the density of each matrix, (6, L): a row per letter, in the order of `masked`."""
        size = (len(self.masked), len(self.model.layers))
        weight = self.linears[0].weight
        return torch.full(size, density, dtype=widest(weight), device=weight.device)

    @torch.no_grad()
    def update(self, step):
        density = self.density(step)
        if self.settings.pattern != "weight":
            keep_pattern(self, density)
            return
        shares = self.shares(density).flatten()  # (6, L) -> (6 * L), in the order of `linears`
        sizes = [len(linears) for linears in self.stacks]
        for linears, part in zip(self.stacks, shares.split(sizes)):
            self.keep_weights(linears, part)

    def keep_weights(self, linears, shares):
        """Mask matrices of one shape by single weights, at the densities `shares`."""
        values = as_one([self.rank(linear) for linear in linears])
        self.wrong |= keep_largest(linears, values, shares * linears[0].weight.numel())

    def kept(self):
        """Return the number of weights that the masks keep, as a tensor."""
        return torch.stack([linear.mask.sum() for linear in self.linears]).sum()

    def achieved(self):
        return int(self.kept()) / self.size

    def tensors(self):
        tensors = {}
        for name, linear in masked_linears(self.model).items():
            tensors[f"{name}.mask"] = linear.mask
            if linear.scores is not None:
                tensors[f"{name}.scores"] = linear.scores.detach()
        return tensors


class SMPLocal(Masked):
    """SMP-L: the whole model is frozen, and only S is learned."""

    recipe = "smp"
    uses = (*Masked.uses, "score_lr", "reg_lambda", "regression")
    output_head = "words"
    sigmoids = ()  # of the scores as they are, where `update` has made them

    def freeze(self):
        self.model.requires_grad_(False)

    @torch.no_grad()
    def penalise(self, step):
        # lambda_t = lambda (1 - (1 - t/T)^3) over ALL steps (SMP, released code)
        strength = cubic_at(step, 0.0, self.settings.reg_lambda, 0, self.total_steps)
        return add_penalty(self.linears, strength, sigmoids=self.sigmoids)


class SMPShared(SMPLocal):
    """SMP-S: peers share the budget of their letter by how large their scores are.

    The share is proportional to r = mean(sigmoid(S / p)). p is in the released code only.
    """

    uses = (*SMPLocal.uses, "temperature_s", "redistribute")

    @torch.no_grad()
    def shares(self, density):
        # In float32 the order of a sum, which depends on the threads, could change a count.
        wide = widest(self.linears[0].weight)
        p = self.settings.temperature_s
        scores = [as_one([linear.scores for linear in stack]) for stack in self.stacks]
        sigmoids = [torch.sigmoid(s) for s in scores]
        if self.linears[0].weight.dtype == torch.float32:  # with bf16 memory matters more
            self.sigmoids = sigmoids
        r = sigmoids if p == 1 else [torch.sigmoid(s / p) for s in scores]
        r = torch.cat([s.mean((1, 2), dtype=wide) for s in r])
        r = r.view(len(self.masked), -1)  # (6 * L) -> (6, L)
        return share_out(r, density, self.settings.redistribute)


# ---------- the movement family -------------------------------------------------------------------


class Movement(Masked):
    """MvP, hard movement pruning: S and W are both learned; each matrix keeps its largest scores.

    By the straight-through gradient S = -lr * sum_t (dL/dW') * W: high where |W| grows.
    """

    recipe = "movement"
    uses = (*Masked.uses, "score_lr")

    def freeze(self):
        self.model.embeddings.requires_grad_(False)  # Sanh et al., released code


class Magnitude(Movement):
    """MaP, magnitude pruning: each matrix keeps its largest |W|. Masked weights get no gradient."""

    recipe = "magnitude"
    uses = Masked.uses
    initial = None

    def rank(self, linear):
        return linear.weight.abs()


class SoftMovement(Movement):
    """SMvP, soft movement pruning: M = sigmoid(S) > tau, with one tau for all matrices.

    tau rises from 0 to 0.1, and the penalty lambda * tau / 0.1 * R pushes scores below it. The
    density is what comes out or, where a density is asked for, what lambda is steered to.
    """

    recipe = "soft-movement"
    uses = ("density", "hold", "ramp", "ramp_power", "score_lr", "reg_lambda", "frozen_dtype")
    threshold = 0.1  # the final tau
    shift = 0.0  # of the scores in R
    top_k = False

    def tau(self, step):
        first = 0.0 if self.first == 1 else self.threshold
        return cubic_at(step, first, self.threshold, self.start, self.end, self.power)

    def settled(self, step):
        target = self.settings.density
        if step < self.end:
            return False
        return target is None or abs(self.achieved() / target - 1) <= 0.1

    def update(self, step):
        for linears in self.stacks:
            scores = as_one([linear.scores for linear in linears])
            least = int(0.005 * scores[0].numel()) + 1  # 0.5% of a matrix stay
            above = (torch.sigmoid(scores) > self.tau(step)).sum((1, 2)).clamp(min=least)
            self.wrong |= keep_largest(linears, scores, above)

    @torch.no_grad()
    def penalise(self, step):
        strength = self.settings.reg_lambda * self.tau(step) / self.threshold
        return add_penalty(self.linears, self.steer(step, strength), self.shift)

    def steer(self, step, strength):
        """Return lambda: `strength` itself, or with a density asked for, a multiple of it.

        The factor is sinh(40 e) with e = log(kept / asked for), between -74 and 74. Runs end within
        3% of the density asked for (measured).
        """
        if self.settings.density is None:
            return strength
        error = (self.kept() / (self.density(step) * self.size)).log()
        return strength * (40 * error).clamp(-5, 5).sinh()


class HardConcreteLinear(MaskedLinear):
    """The layer of L0: a gate in [0, 1] with a true gradient (Louizos et al. 2018).

    s = sigmoid((log u - log(1 - u) + S) / b) in training, with u drawn from (0, 1)
    s = sigmoid(S) in evaluation
    M = clamp(1.2 s - 0.1, 0, 1)
    """

    temperature = 2 / 3  # b
    noise = 0.0  # log u - log(1 - u), drawn anew in every step

    def gate(self, training=False):
        logit = (self.noise + self.scores) / self.temperature if training else self.scores
        return (1.2 * torch.sigmoid(logit) - 0.1).clamp(0, 1)

    def masked_weight(self):
        return self.gate(self.training) * self.weight


class L0(SoftMovement):
    """L0 regularisation with the hard concrete gate. lambda is constant.

    R = mean over matrices of mean(sigmoid(S - b log(0.1 / 1.1))): P(a gate is not zero).
    """

    recipe = "l0"
    layer = HardConcreteLinear
    initial = 2.197  # sigmoid(2.197) = 0.9
    shift = HardConcreteLinear.temperature * math.log(0.1 / 1.1)

    def tau(self, step):
        return self.threshold

    def update(self, step):
        seed = self.settings.seed * 1_000_003 + step  # the same on every rank and after a resume
        generator = torch.Generator(self.linears[0].weight.device).manual_seed(seed)
        for linear in self.linears:
            u = torch.empty_like(linear.weight).uniform_(1e-4, 1 - 1e-4, generator=generator)
            linear.noise = u.logit_()
            linear.mask.copy_(linear.gate() > 0)  # to count; layers use gate()


# ---------- no masks: PINS and its relatives ------------------------------------------------------


class Fixed(Dense):
    """No criterion: fine-tune what a run has kept. A weight that is 0 at the start stays 0."""

    recipe = "fixed"
    uses = ("regression",)  # where the run to start from reads label words
    output_head = None  # that of the run to start from

    def __init__(self, model, settings, total_steps):
        super().__init__(model, settings, total_steps)
        self.weights = [linear.weight for linear in encoder_linears(model)]
        self.zeros = ()  # the masks of what stays 0; none: nothing does

    def keep_zeros(self, model):
        self.zeros = [linear.weight == 0 for linear in encoder_linears(model)]

    @torch.no_grad()
    def update(self, step):
        for weight, mask in zip(self.weights, self.zeros):
            weight.masked_fill_(mask, 0.0)

    def achieved(self):
        kept = sum(weight.count_nonzero() for weight in self.weights)
        return int(kept) / sum(weight.numel() for weight in self.weights)


class Pins(Fixed):
    """PINS: zero the weights of least importance in the whole encoder; train all of them.

    The 0-1 ILP: choose k weights (m_i = 1) so that a gradient step under the mask m lowers the loss
    most. To first order the loss changes by
        g . (m (theta - eta g) - theta) = sum_i m_i g_i (theta_i - eta g_i) - g . theta,
    which is linear in m. It is least where m keeps the k largest
        I = -theta g + eta g^2   (`signed`).

    `absolute` (released code, our default) is the ILP of least damage. Pruning changes the loss by
    sum_i (1 - m_i) I_i, which is at most sum_i (1 - m_i) |I_i|. Keeping the k largest |I| makes
    this bound least. docs/methods.md proves both, and shows why `signed` fails in practice.
    """

    recipe = "pins"
    uses = ("density", "hold", "ramp", "ramp_power", "pins_score", "pins_window", "beta1", "beta2")
    output_head = "classifier"

    def __init__(self, model, settings, total_steps):
        super().__init__(model, settings, total_steps)
        if not self.settled(total_steps) or total_steps <= settings.pins_window:
            ends = f"the ramp ends at step {self.end:g} of {total_steps}"
            ranks = f"{self.recipe} ranks after it and after {settings.pins_window} steps"
            raise ValueError(f"{ends}, and {ranks}: use more steps or a smaller ramp")
        self.sizes = [weight.numel() for weight in self.weights]
        # Flat, over all matrices: the sum of I in the present window, the moving average of the
        # windows' means, and that of how far they lie from it (the uncertainty).
        zeros = torch.zeros(3, sum(self.sizes), device=self.weights[0].device)
        self.sums, self.ema, self.unc = zeros  # the three rows
        self.mask = None  # flat: what is kept; None: nothing is to be zeroed after this step

    def settled(self, step):
        return step - 1 > self.end  # the last step ranked after the ramp

    def factor(self, weight, grad, lr):
        """Return what, times `grad`, is the importance I."""
        step = torch.sub(weight, grad, alpha=lr)  # theta - eta g
        if self.settings.pins_score == "absolute":
            return step.copysign_(grad)  # of the sign of g, so that the product is |I|
        return step.neg_()

    def importance(self):
        return self.ema * self.unc

    @torch.no_grad()
    def observe(self, step, lr):
        s = self.settings
        place = step % s.pins_window  # in the window
        if place == 0:
            mean = self.sums.div_(s.pins_window)
            self.ema.lerp_(mean, 1 - s.beta1)
            self.unc.lerp_((mean - self.ema).abs_(), 1 - s.beta2)
            self.sums.zero_()
        for weight, total in zip(self.weights, self.sums.split(self.sizes)):
            grad = weight.grad.nan_to_num(0.0, 0.0, 0.0) if self.skips else weight.grad
            total.view_as(weight).addcmul_(self.factor(weight, grad, lr), grad)  # (n,) -> (out, in)
        ranks = step > self.start and place == 0  # once per window in the ramp, then every step
        if step >= s.pins_window and (ranks or step > self.end):  # before, nothing is measured
            self.mask = self.select(self.density(step))

    def select(self, density):
        """Return the flat mask of what stays, or None where everything stays.

        Of n weights the int(n (1 - v)) - 1 least important go (released code); of equals the last.
        """
        importance = self.importance()
        below = int(importance.numel() * (1 - density))
        if below == 0:
            return None
        table = importance.view(1, -1, self.weights[0].size(1))  # (n) -> (1, n / width, width)
        count = torch.full((1,), importance.numel() - below + 1, device=importance.device)
        (mask,), wrong = top_k_masks(table, count)
        self.wrong |= wrong
        return mask.flatten()

    @torch.no_grad()
    def update(self, step):
        super().update(step)
        if self.mask is None:
            return
        for weight, zeros in zip(self.weights, (~self.mask).split(self.sizes)):
            weight.masked_fill_(zeros.view_as(weight), 0.0)  # (numel,) -> (out, in)
        self.mask = None

    def state(self):
        return {"sums": self.sums, "ema": self.ema, "uncertainty": self.unc}


class Platon(Pins):
    """PLATON: I = |theta g|, the change of the loss if a weight were zero; averages as PINS."""

    recipe = "platon"
    uses = ("density", "hold", "ramp", "ramp_power", "pins_window", "beta1", "beta2")

    def factor(self, weight, grad, lr):
        return torch.copysign(weight, grad)


class Sensitivity(Platon):
    """|theta g| alone: the mean over the last whole window (beta1 is 0), without uncertainty."""

    recipe = "sensitivity"
    uses = ("density", "hold", "ramp", "ramp_power", "pins_window", "beta1")

    def importance(self):
        return self.ema


CRITERIA = {
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
METHODS = CRITERIA | {"fixed": Fixed}
