"""Properties of prune.py and of what it calls: gradients, masks, patterns, shares, schedules."""

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prune
from model import Bert, BertConfig
from models.checkpoint import baked_state, load_model
from models.teacher import distill
from prune import METHODS, MaskedLinear, share_out
from support.matrices import as_one
from support.patterns import block_values
from support.schedules import cubic_at

TINY = Path(__file__).parent / "golden" / "tiny-bert"
SETTINGS = {
    "density": 0.1,
    "hold": 0.0,
    "ramp": 0.5,
    "pattern": "weight",
    "lr": 1e-3,
    "score_lr": 2e-2,
    "weight_decay": 0.01,
    "seed": 0,
    "reg_lambda": 400.0,
    "temperature_s": 1.0,
    "redistribute": True,
    "pins_score": "absolute",
    "pins_window": 2,
    "beta1": 0.85,
    "beta2": 0.99,
}


def make(name, **changes):
    """The tiny BERT with 3 outputs and the method `name` on it, for a run of 20 steps."""
    model = load_model(TINY, METHODS[name].output_head, outputs=3, words=[5, 6, 7])
    settings = SimpleNamespace(**SETTINGS | changes)
    return model, METHODS[name](model, settings, total_steps=20)


def golden_inputs():
    """The model's inputs of the first recorded batch."""
    data = np.load(TINY.parent / "batches.npz")
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: torch.from_numpy(data[name][0]) for name in names}


@pytest.mark.parametrize("name", ["smp-s", "movement", "l0"])
def test_scores_lie_side_by_side(name):
    """Those of one shape are parts of one tensor, and stay so when the optimizer moves them."""
    _, method = make(name)
    assert [len(stack) for stack in method.stacks] == [12, 3, 3]  # QKVO, U and D of three layers
    optimizer = torch.optim.AdamW([linear.scores for linear in method.linears], lr=0.1)
    for linear in method.linears:
        linear.scores.grad = torch.ones_like(linear.scores)
    for _ in range(2):
        for stack in method.stacks:
            scores = [linear.scores for linear in stack]
            assert as_one(scores).data_ptr() == scores[0].data_ptr()
            assert torch.equal(as_one(scores), torch.stack(scores))
        optimizer.step()


def test_exact_k_from_all_zero_scores():
    """All scores start at 0, so all are tied: each mask keeps the first int(v * numel) weights.

    A second update gives the same masks.
    """
    for name in ("smp-l", "smp-s"):
        _, method = make(name)
        for linear in method.linears:
            assert not linear.scores.any()
        for _ in range(2):
            method.update(20)
            for linear in method.linears:
                k = int(linear.mask.sum())
                assert k == int(0.1 * linear.mask.numel())
                assert linear.mask.flatten()[:k].all()  # the first in row-major order


def set_ranked(method, fill):
    """Give each matrix new values to rank its weights by, made by `fill(shape)`."""
    for linear in method.linears:
        ranked = linear.weight if linear.scores is None else linear.scores
        ranked.data.copy_(fill(linear.weight.shape))


@pytest.mark.parametrize("name", ["smp-l", "smp-s", "movement", "magnitude"])
@pytest.mark.parametrize("pattern, density", [("2:4", 0.5), ("1:8", 0.125)])
def test_n_of_m_patterns(name, pattern, density):
    """At the final density every group of m neighbours keeps n.

    While the density falls, the number kept is exact. Two groups differ by at most one, and those
    that keep one more are those whose next value is larger.
    """
    n, m = map(int, pattern.split(":"))
    _, method = make(name, pattern=pattern, density=density)
    for fill in (torch.zeros, torch.randn):  # all values tied, then all different
        set_ranked(method, fill)
        method.update(20)
        for linear in method.linears:
            kept = linear.mask.unflatten(1, (-1, m)).sum(2)  # (out, in) -> (out, in / m)
            assert (kept == n).all()
        method.update(0)
        assert method.achieved() == 1
        for step in (1, 5, 8):
            method.update(step)
            for linear in method.linears:
                assert int(linear.mask.sum()) == int(method.density(step) * linear.mask.numel())
                kept = linear.mask.unflatten(1, (-1, m)).sum(2)  # (out, in) -> (out, in / m)
                most, least = kept.max(), kept.min()
                assert most - least <= 1
                groups = method.rank(linear).unflatten(1, (-1, m))  # (out, in) -> (out, in / m, m)
                ordered = groups.sort(dim=2, descending=True).values
                following = ordered[:, :, least]  # (out, in / m): the next value of each group
                assert following[kept == most].min() >= following[kept == least].max()


@pytest.mark.parametrize("name", ["smp-l", "smp-s", "movement", "magnitude"])
def test_square_blocks(name):
    """A matrix keeps whole blocks, those of the largest sums, and as many as its density says."""
    _, method = make(name, pattern="8x8", density=0.3)
    for fill in (torch.zeros, torch.randn):  # all values tied, then all different
        set_ranked(method, fill)
        for step in (5, 20):
            method.update(step)
            density = method.density(step)
            for linears, shares in zip(method.masked.values(), method.shares(density)):
                for linear, share in zip(linears, shares):
                    kept, lost = [], []
                    for rows, scores in zip(linear.mask.split(8), method.rank(linear).split(8)):
                        for block, its_scores in zip(rows.split(8, 1), scores.split(8, 1)):
                            assert block.all() or not block.any()
                            (kept if block.any() else lost).append(its_scores.double().sum())
                    assert len(kept) == int(share * (len(kept) + len(lost)))
                    assert min(kept) >= max(lost)
    with pytest.raises(ValueError, match="9x9: a matrix is"):
        make(name, pattern="9x9", density=0.3)


@pytest.mark.parametrize("name", ["smp-l", "smp-s", "movement", "magnitude"])
@pytest.mark.parametrize("pattern, density", [("unit", 0.3), ("head", 0.5)])
def test_block_patterns(name, pattern, density):
    """A unit (and with the pattern "head" an attention head) is kept or dropped as a whole.

    The number kept is the density asked for. The units kept have the largest mean scores.
    """
    model, method = make(name, pattern=pattern, density=density)
    heads = model.config.num_attention_heads
    units = model.config.intermediate_size
    layers = model.config.num_hidden_layers
    for fill in (torch.zeros, torch.randn):  # all values tied, then all different
        set_ranked(method, fill)
        method.update(20)
        masks = {}
        for letter, column in method.masked.items():
            masks[letter] = [linear.mask for linear in column]

        kept_units = 0
        for up, down in zip(masks["U"], masks["D"], strict=True):
            kept = up[:, 0]  # (units,)
            assert torch.equal(up, kept[:, None].expand_as(up))
            assert torch.equal(down, kept.expand_as(down))
            kept_units += int(kept.sum())
        assert kept_units == pytest.approx(density * units * layers, abs=layers)

        if pattern == "unit":  # the other matrices are pruned weight by weight
            single = masks["Q"] + masks["K"]
            kept_weights = sum(int(mask.sum()) for mask in single)
            weights = sum(mask.numel() for mask in single)
            assert kept_weights == pytest.approx(density * weights, abs=2 * layers)
            continue
        for q, k, v, o in zip(masks["Q"], masks["K"], masks["V"], masks["O"], strict=True):
            kept = q.unflatten(0, (heads, -1))[:, 0, 0]  # -> (heads, size, in) -> (heads,)
            rows = kept.repeat_interleave(len(q) // heads)  # (heads,) -> (out,)
            for mask in (q, k, v):
                assert torch.equal(mask, rows[:, None].expand_as(mask))
            assert torch.equal(o, rows.expand_as(o))

    up, down = method.masked["U"][0], method.masked["D"][0]
    means = block_values([method.rank(up), method.rank(down)], units)  # (units,)
    sums = method.rank(up).sum(1) + method.rank(down).sum(0)
    scores_of_a_unit = 2 * model.config.hidden_size
    assert (means * scores_of_a_unit - sums).abs().max() < 1e-4
    kept = up.mask[:, 0]
    assert means[kept].min() >= means[~kept].max()


def test_straight_through():
    """The layer computes y = x (W * M)^T, and dL/dS = dL/dW' * W also where the mask is 0.

    A frozen W gets no gradient.
    """
    torch.manual_seed(0)
    linear = nn.Linear(16, 24)
    linear.weight.requires_grad_(False)
    masked = MaskedLinear(linear)
    masked.mask.copy_(torch.rand(24, 16) < 0.3)
    x = torch.randn(8, 16, requires_grad=True)
    grad_y = torch.randn(8, 24)
    y = masked(x)
    y.backward(grad_y)
    used = linear.weight * masked.mask
    assert torch.equal(y, F.linear(x, used, linear.bias))
    assert torch.equal(masked.scores.grad, grad_y.T @ x.detach() * linear.weight)
    assert torch.allclose(x.grad, grad_y @ used)
    assert masked.scores.grad[~masked.mask].abs().min() > 0
    assert linear.weight.grad is None


def test_penalty_gradient_is_autograds():
    """The penalty's value, and its gradient in closed form, are those that autograd computes."""
    _, method = make("smp-s")
    for linear in method.linears:
        nn.init.normal_(linear.scores)
        linear.scores.grad = torch.zeros_like(linear.scores)
    value = method.penalise(7)
    by_hand = [linear.scores.grad.clone() for linear in method.linears]

    scores = [linear.scores for linear in method.linears]
    r = torch.stack([torch.sigmoid(s).mean() for s in scores]).mean()
    weight = cubic_at(7, 0.0, 400.0, 0, 20)
    automatic = torch.autograd.grad(weight * r, scores)
    assert torch.allclose(value, r)
    for ours, theirs in zip(by_hand, automatic, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-9)


def test_schedules():
    """The cubic schedule starts and ends at the values given and moves one way in between."""
    density = [cubic_at(t, 1.0, 0.1, 0, 60) for t in range(101)]
    assert density[0] == 1.0
    assert density[60] == 0.1
    assert density[100] == 0.1
    for this, following in zip(density[:60], density[1:61], strict=True):
        assert this > following
    assert density[30] == pytest.approx(0.1 + 0.9 / 8)  # half of the steps leave (1/2)^3 of the way
    penalty = [cubic_at(t, 0.0, 400.0, 0, 100) for t in range(101)]
    assert penalty[0] == 0
    assert penalty[100] == 400
    assert penalty == sorted(penalty)


def test_shares_reach_the_density_asked_for():
    """Shares are at most 1, proportional to r below 1, and their mean is the density asked for.

    The released rule, which does not redistribute, falls short of that density in many cases.
    """
    rng = np.random.default_rng(0)
    short = 0
    for _ in range(200):
        layers = int(rng.integers(1, 13))
        r = torch.from_numpy(rng.uniform(0.01, 1, size=(6, layers)) ** rng.integers(1, 6))
        density = float(rng.uniform(0.02, 1))
        shares = share_out(r, density)
        assert shares.max() <= 1
        assert torch.allclose(shares.mean(dim=1), torch.tensor(density, dtype=r.dtype))
        for row, share in zip(r, shares, strict=True):
            below = share < 1 - 1e-12
            ratio = share[below] / row[below]
            assert torch.allclose(ratio, ratio[:1].expand_as(ratio))
            full = ~below
            if below.any() and full.any():  # the full matrices are those of largest r
                assert row[full].min() >= row[below].max()
        released = share_out(r, density, redistribute=False)
        assert torch.allclose(released, (density * r / r.mean(dim=1, keepdim=True)).clamp(max=1))
        if released.mean() < density - 1e-6:
            short += 1
    assert short > 50


def test_a_share_of_one_is_exactly_one():
    """Where all shares should be 1, rounding loses neither an attention head nor a weight.

    The r of a row are a few random values that repeat. Then their sum and the rest are rounded.
    """
    rng = np.random.default_rng(0)
    for _ in range(500):
        values = rng.uniform(0.01, 1, size=3)
        r = torch.from_numpy(rng.choice(values, size=(6, 12)))
        shares = share_out(r, 1.0)
        assert (shares == 1).all()
        for count in (12, 3072 * 768):  # heads of a layer, weights of a matrix
            assert int(count * shares.min()) == count
        equal = r[:, :1].expand(6, 12)
        assert (share_out(equal, 1.0, redistribute=False) == 1).all()
    shares = share_out(torch.tensor([[1.0, 1.0, 1 - 1e-6]]).double(), 1 - 1e-6)
    assert shares.max() < 1  # a share that should be less than 1 stays so


def test_frozen_matrices_in_bf16_keep_no_sigmoids():
    """SMP-S keeps the sigmoids of its scores in float32 alone; R and its gradient are the same."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Bert(BertConfig(vocab_size=9, hidden_size=24, num_hidden_layers=2), "words")
        method = METHODS["smp-s"](model, SimpleNamespace(**SETTINGS), total_steps=20)
        torch.manual_seed(0)
        for linear in method.linears:
            linear.weight.data = linear.weight.to(dtype)
            nn.init.normal_(linear.scores)
            linear.scores.grad = torch.zeros_like(linear.scores)
        method.update(15)
        assert len(method.sigmoids) == (len(method.stacks) if dtype == torch.float32 else 0)
        found.append((method.penalise(15), [linear.scores.grad for linear in method.linears]))
    assert found[0][0] == found[1][0] > 0
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_threads_do_not_move_a_share():
    """SMP-S gives each matrix the same share whether torch uses one thread or two.

    The matrices are so large that torch splits a sum among threads. In float32 that would change
    the last bits of the sum.
    """
    config = BertConfig(vocab_size=9, hidden_size=240, num_hidden_layers=2, intermediate_size=960)
    model = Bert(config, "words")
    method = METHODS["smp-s"](model, SimpleNamespace(**SETTINGS), total_steps=20)
    torch.manual_seed(0)
    for linear in method.linears:
        nn.init.normal_(linear.scores)
    shares = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            shares.append(method.shares(method.density(15)).tolist())
    finally:
        torch.set_num_threads(before)
    assert shares[0] == shares[1]
    assert len({share for row in shares[0] for share in row}) > 4  # they differ, so sums matter


def test_what_is_masked_and_what_is_frozen():
    """SMP masks the six matrices of each layer and trains their scores, and nothing else.

    A model cannot be masked twice.
    """
    model, method = make("smp-l")
    expected = set()
    for i in range(3):
        expected |= {f"bert.encoder.layer.{i}.{name}" for name in model.matrices.values()}
    modules = dict(model.named_modules())
    masked = {name for name, module in modules.items() if isinstance(module, MaskedLinear)}
    assert masked == expected
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.scores" for name in masked}
    optimized = [p for group in method.groups() for p in group["params"]]
    weights = sum(linear.weight.numel() for linear in method.linears)
    assert sum(p.numel() for p in optimized) == weights
    with pytest.raises(AssertionError):
        prune.mask_matrices(model)


def test_baked_forward_is_masked_forward():
    """A plain model with the baked weights gives the masked model's output, bit for bit.

    Baking it again changes nothing. The pruned weights are 0.0 and not -0.0, and their number
    is that of the density.
    """
    model, method = make("smp-s")
    for i, linear in enumerate(method.linears):
        generator = torch.Generator().manual_seed(i)
        nn.init.normal_(linear.scores, mean=i / 9, generator=generator)
    method.update(20)
    state = baked_state(model)
    plain = load_model(TINY, "words", words=[5, 6, 7])
    plain.load_state_dict(state)
    inputs = golden_inputs()
    assert torch.equal(model.eval()(**inputs), plain.eval()(**inputs))
    again = baked_state(plain)
    for a, b in zip(again.values(), state.values(), strict=True):
        assert torch.equal(a, b)

    zeros = 0
    for name in method.tensors():
        if name.endswith(".scores"):
            weight = state[name.removesuffix("scores") + "weight"]
            zero = weight == 0
            assert not (torch.signbit(weight) & zero).any()  # 0.0, not -0.0
            zeros += int(zero.sum())
    weights = sum(linear.weight.numel() for linear in method.linears)
    assert 1 - zeros / weights == pytest.approx(method.achieved())
    # each of the 18 matrices rounds its number down, and so loses less than one weight
    assert abs(method.achieved() - 0.1) < 18 / weights


def test_distillation():
    """The loss is half the task's loss and half T^2 KL(teacher || student) at T = 2.

    Where the student equals the teacher, the second half is 0 and has no slope.
    """
    torch.manual_seed(0)
    student = torch.randn(5, 3, requires_grad=True)
    teacher = torch.randn(5, 3)
    task = torch.rand(5)
    p = F.softmax(teacher / 2, dim=1)
    q = F.softmax(student / 2, dim=1)
    expected = 0.5 * task + 0.5 * 4 * (p * (p / q).log()).sum(dim=1)
    assert torch.allclose(distill(task, student, teacher), expected, atol=1e-6)
    same = copy.deepcopy(teacher).requires_grad_()
    loss = distill(task, same, teacher)
    assert torch.allclose(loss, 0.5 * task, atol=1e-6)
    assert torch.autograd.grad(loss.sum(), same)[0].abs().max() < 1e-6


def criterion(name, theta, grad, lr):
    """PINS's importance I ("signed") or |I| ("absolute") of each weight, as an array."""
    pins = SimpleNamespace(settings=SimpleNamespace(pins_score=name))
    grad = torch.from_numpy(grad)
    values = METHODS["pins"].factor(pins, torch.from_numpy(theta), grad, lr) * grad
    return values.numpy()


def test_pins_criterion_solves_the_ilp():
    """No mask with k ones is better than the one that PINS's criterion gives.

    Keeping the k largest I gives the least predicted loss, and keeping the k largest |I| gives the
    least bound on the loss's change. The test tries all masks of up to 12 weights, for every k.
    """
    rng = np.random.default_rng(0)
    lr = 0.3
    for n in (5, 8, 12):
        theta = rng.normal(size=n)
        grad = rng.normal(size=n)
        masks = np.array(list(itertools.product((0, 1), repeat=n)), float)  # (2^n, n)
        change = (masks * (theta - lr * grad) - theta) @ grad  # g . (m (theta - eta g) - theta)
        damage = (1 - masks) @ np.abs((theta - lr * grad) * grad)
        for k in range(n + 1):
            feasible = masks.sum(1) == k
            for name, cost in (("signed", change), ("absolute", damage)):
                importance = criterion(name, theta, grad, lr)
                kept = np.isin(np.arange(n), np.argsort(-importance)[:k])
                place = (masks == kept).all(1).argmax()
                assert cost[place] == pytest.approx(cost[feasible].min(), abs=1e-12)


def test_absolute_is_not_the_ilps_solution():
    """Of two weights, I and |I| keep different ones.

    Dropping the first weight is predicted to lower the loss by 0.9. So I drops it, but |I| keeps
    it, because the change is large.
    """
    theta = np.array([1.0, 1.0])
    grad = np.array([1.0, -0.4])
    lr = 0.1
    predicted = []
    for mask in ((1, 0), (0, 1)):
        predicted.append(grad @ (np.array(mask) * (theta - lr * grad) - theta))
    assert predicted[1] < predicted[0]
    assert np.argmax(criterion("signed", theta, grad, lr)) == 1
    assert np.argmax(criterion("absolute", theta, grad, lr)) == 0


@pytest.mark.parametrize("name", ["pins", "platon", "sensitivity"])
def test_a_ramp_that_leaves_no_final_phase_is_refused(name):
    """A method that zeroes weights after the ramp says so where no step is left for it.

    A run of 20 steps ends with step 19, so that a ramp has to end before step 19. Nothing can be
    ranked either before the first window of importances is over.
    """
    for hold, ramp, end in ((0.0, 1.0, 20), (0.5, 0.5, 20), (0.0, 0.95, 19)):
        expected = f"the ramp ends at step {end} of 20, and {name} ranks after it"
        with pytest.raises(ValueError, match=expected):
            make(name, hold=hold, ramp=ramp)
    with pytest.raises(ValueError, match="after 20 steps: use more steps"):
        make(name, pins_window=20)
    _, method = make(name, hold=0.0, ramp=0.9)
    assert method.settled(20)


@pytest.mark.parametrize("name", ["pins", "platon", "sensitivity"])
def test_equal_importances_do_not_change_the_number_kept(name, monkeypatch):
    """N - int(N (1 - v)) + 1 weights stay, also where most importances are equal.

    Here only one matrix has a gradient, so that all other weights have importance 0. The code for
    an accelerator, run here on the CPU, gives the same mask.
    """
    model, method = make(name)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        method.weights[7].grad.normal_(generator=generator)
        method.observe(step, 1e-3)
        mask = method.mask
        method.update(step + 1)
    n = sum(method.sizes)
    k = n - int(n * 0.9) + 1
    importance = method.importance()
    assert 0 < int((importance > 0).sum()) < k
    assert int(mask.sum()) == k
    assert method.achieved() == k / n
    assert mask[importance > 0].all()
    mask = method.select(0.1)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    assert torch.equal(method.select(0.1), mask)


@pytest.mark.parametrize("name", ["smp-l", "smp-s", "movement", "magnitude"])
@pytest.mark.parametrize(
    "pattern, size, what",
    [
        ("weight", 32 * 32, "weights"),
        ("8x8", 16, "blocks"),
        ("unit", 64, "units"),
        ("head", 4, "attention heads"),
    ],
)
def test_a_density_that_keeps_nothing_is_refused(name, pattern, size, what):
    """At least one weight of a matrix, or one block of a pattern, has to stay.

    The methods whose density is not a number of weights have a least number of their own.
    """
    with pytest.raises(ValueError, match=f"keeps 0 of {size} {what}"):
        make(name, pattern=pattern, density=0.99 / size)
    _, method = make(name, pattern=pattern, density=1.01 / size)
    method.update(20)
    for linear in method.linears:
        assert linear.mask.any()
    for steered in ("soft-movement", "l0"):
        for density in (0.99 / size, None):
            make(steered, density=density)


@pytest.mark.parametrize("name", ["pins", "platon", "sensitivity"])
def test_zeros_stay_zero(name):
    """Once the density has settled, exactly the weights of least importance are 0.0 after a step.

    AdamW's moments and weight decay do not move them. The number kept is the release's,
    N - int(N (1 - v)) + 1. A second `update` without new gradients changes nothing.
    """
    model, method = make(name, hold=0.1, ramp=0.4)
    parameters = [p for group in method.groups() for p in group["params"]]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    n = sum(method.sizes)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        method.observe(step, 1e-3)
        ranked = method.mask
        optimizer.step()
        method.update(step + 1)
        if step > 10:  # the density falls until step (0.1 + 0.4) * 20
            zero = torch.cat([w.detach().flatten() for w in method.weights]) == 0
            assert torch.equal(zero, ~ranked)
            assert int((~zero).sum()) == n - int(n * 0.9) + 1
            assert method.settled(step + 1)
        before = [w.detach().clone() for w in method.weights]
        method.update(step + 1)  # as after a resume
        for a, b in zip(before, method.weights, strict=True):
            assert torch.equal(a, b)
    assert not method.settled(10)
    assert method.achieved() == pytest.approx(0.1, abs=2 / n)


def test_masked_weights_learn_by_their_mask_only():
    """In movement pruning a masked weight has no gradient, but its score has one.

    The embeddings are frozen. The biases and the output head are trained.
    """
    model, method = make("movement")
    nn.init.normal_(method.linears[0].scores)
    method.update(20)
    model(**golden_inputs()).square().sum().backward()
    for linear in method.linears:
        assert not linear.weight.grad[~linear.mask].any()
        assert linear.scores.grad[~linear.mask].any()
        assert linear.bias.grad is not None
    names = [name for name, _ in model.named_parameters()]
    embeddings = {name for name in names if name.startswith("bert.embeddings.")}
    assert {name for name, p in model.named_parameters() if p.grad is None} == embeddings
    assert model.classifier.weight.grad.any()


def masks_after_training(name, score_lr, **changes):
    """The masks and scores of the first matrix after ten steps of AdamW."""
    model, method = make(name, score_lr=score_lr, **changes)
    optimizer = torch.optim.AdamW(method.groups())
    model.eval()  # without dropout
    for step in range(10):
        method.update(step)
        F.cross_entropy(model(**golden_inputs()), torch.arange(8) % 3).backward()
        method.penalise(step)
        optimizer.step()
        optimizer.zero_grad()
    method.update(10)
    linear = method.linears[0]
    return linear.mask, linear.scores.detach()


@pytest.mark.parametrize("name", ["smp-l", "movement"])
def test_the_rate_of_the_scores_acts_through_the_regulariser_alone(name):
    """A mask depends on the order of the scores, and AdamW's steps are proportional to the rate.

    So a rate that is 8 times as large gives scores that are 8 times as large, and the same masks.
    Only what depends on the size of a score changes that: the regulariser.
    """
    mask, scores = masks_after_training(name, 0.02, reg_lambda=0.0)
    same_mask, larger = masks_after_training(name, 0.16, reg_lambda=0.0)
    assert torch.equal(mask, same_mask) and torch.equal(8 * scores, larger)
    if name == "smp-l":
        _, scores = masks_after_training(name, 0.02, reg_lambda=400.0)
        _, larger = masks_after_training(name, 0.16, reg_lambda=400.0)
        assert not torch.equal(8 * scores, larger)


def test_hard_concrete():
    """L0's gates have the published form and depend on nothing but the scores, seed and step.

    In evaluation no noise is drawn. There some gates are exactly 0 and some exactly 1.
    """
    _, method = make("l0")
    linear = method.linears[0]
    with torch.no_grad():
        linear.scores.normal_(std=3)
    gates = []
    for step in (3, 4, 3):
        method.update(step)
        gates.append(linear.gate(training=True))
    assert torch.equal(gates[0], gates[2])
    assert not torch.equal(gates[0], gates[1])
    still = linear.gate()
    assert torch.equal(still > 0, linear.mask)
    assert (still == 0).any()
    assert (still == 1).any()
    u = torch.sigmoid(linear.noise)
    assert u.min() >= 1e-4
    assert u.max() <= 1 - 1e-4
    assert abs(float(u.mean()) - 0.5) < 0.02
    expected = torch.sigmoid((u.log() - (1 - u).log() + linear.scores) / (2 / 3)) * 1.2 - 0.1
    assert torch.allclose(gates[0], expected.clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize(
    "name, score_lr, density", [("soft-movement", 0.04, 0.1), ("l0", 0.2, 0.1), ("l0", 0.2, 0.03)]
)
def test_lambda_is_steered_to_the_density(name, score_lr, density):
    """Lambda is steered so that a small regression ends within 5% (relative) of the density.

    With a constant lambda, soft movement would end 94% below it and L0 at 0.
    """
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = Bert(config, "classifier", 4)
    steps = 200
    changes = {"density": density, "hold": 0.1, "ramp": 0.7, "score_lr": score_lr}
    method = METHODS[name](model, SimpleNamespace(**SETTINGS | changes), steps)
    model.train(name == "l0")  # L0 draws its gates in training mode only
    optimizer = torch.optim.AdamW(method.groups(), lr=1e-3)
    ids = torch.randint(30, (16, 8))
    target = torch.randn(16, 4)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (1 - step / steps)
        method.update(step)
        loss = (model(**inputs) - target).square().mean()
        loss.backward()
        method.penalise(step)
        optimizer.step()
        optimizer.zero_grad()
    method.update(steps)
    assert method.achieved() == pytest.approx(density, rel=0.05)
    assert method.settled(steps)


def test_the_factor_of_lambda_is_bounded():
    """However far the density is from that asked for, |lambda| grows 74-fold at most."""
    for asked, sign in ((0.01, 1), (0.99, -1)):  # of 100 weights 50 are kept
        steered = SimpleNamespace(
            settings=SimpleNamespace(density=asked),
            kept=lambda: torch.tensor(50.0),
            density=lambda step, asked=asked: asked,
            size=100,
        )
        factor = METHODS["soft-movement"].steer(steered, 0, 1.0)
        assert float(factor) == pytest.approx(sign * math.sinh(5))
