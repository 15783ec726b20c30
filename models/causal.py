"""How a decoder continues texts: a key/value cache, greedy decoding and beam search.

The tokens are those that `transformers` 5 generates for each prompt alone, with
`early_stopping=False`. Nothing is drawn at random.

Axes: B prompts, R rows (B, or B * beams), T tokens, P tokens of a prompt, V vocabulary,
K candidates, H attention heads, D their size.
"""

from contextlib import contextmanager

import torch
from torch import nn

from prune import masked_linears

NEVER = -1e9  # the score of a beam that does not exist

# ---------- rows of tokens ------------------------------------------------------------------------


class Cache:
    """The keys and values of one layer, (R, H, T, D), with room for `size` tokens."""

    def __init__(self, size):
        self.size = size
        self.length = 0

    def add(self, k, v):
        """Add those of the next tokens, (R, H, n, D); return all."""
        if self.length == 0:
            self.k = k.new_empty(*k.shape[:2], self.size, k.size(3))
            self.v = v.new_empty(*v.shape[:2], self.size, v.size(3))
        end = self.length + k.size(2)
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def take(self, rows, first):
        """Replace the rows by `rows` of them, which are alike before token `first`."""
        if first == 0:
            self.k, self.v = self.k[rows], self.v[rows]
            return
        new = slice(first, self.length)
        self.k[:, :, new] = self.k[rows, :, new]
        self.v[:, :, new] = self.v[rows, :, new]


class Reader:
    """Rows of tokens that grow, and a decoder that reads them.

    `tokens` is (R, T), with -1 on the left of shorter prompts. `cached=False` reads all tokens anew
    in each step.
    """

    def __init__(self, model, prompts, most_new, cached):
        device = model.head_weight.device
        self.model = model
        self.first = max(map(len, prompts))  # P, where the new tokens begin
        padded = [[-1] * (self.first - len(prompt)) + list(prompt) for prompt in prompts]
        self.tokens = torch.tensor(padded, device=device)
        size = self.first + most_new - 1  # the last new token is never read
        self.caches = [Cache(size) for _ in model.layers] if cached else []

    def logits(self):
        """Return the logits of the token after each row, (R, V) in float32."""
        real = self.tokens >= 0  # (R, T)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        read = self.caches[0].length if self.caches else 0  # tokens that are in the caches
        width = self.tokens.size(1)
        here = torch.arange(read, width, device=real.device)[:, None]  # (n, 1)
        there = torch.arange(width, device=real.device)  # (T,)
        # a token attends to those before it and, so that padding attends to something, to itself
        mask = (real[:, None] & (there <= here)) | (there == here)  # (R, n, T)
        tokens = self.tokens[:, read:].clamp(min=0)
        hidden = self.model.body(tokens, positions[:, read:], mask[:, None], self.caches)
        return self.model.logits(hidden[:, -1])

    def take(self, rows, same_prompts=False):
        """Replace the rows by `rows` of them; a row may then have another one's new tokens."""
        self.tokens = self.tokens[rows]
        for cache in self.caches:
            cache.take(rows, self.first if same_prompts else 0)

    def append(self, tokens):
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)  # (R, T) -> (R, T + 1)


def ban_repeats(scores, tokens, n):
    """Set the score (R, V) of each token to -inf that would repeat n tokens of its row (R, T)."""
    if n == 0 or tokens.size(1) < n:
        return
    grams = tokens.unfold(1, n, 1)  # (R, T - n + 1, n)
    last = tokens[:, tokens.size(1) - n + 1 :]  # (R, n - 1)
    again = (grams[..., :-1] == last[:, None]).all(-1) & (grams[..., -1] >= 0)  # (R, T - n + 1)
    row, place = again.nonzero(as_tuple=True)
    scores[row, grams[row, place, -1]] = -torch.inf


# ---------- greedy decoding, and beam search ------------------------------------------------------


def greedy(reader, ends, no_repeat, most_new):
    """Return the new tokens of each row: always the most probable next token."""
    done = [None] * len(reader.tokens)
    left = torch.arange(len(done))  # which prompts the rows belong to
    for step in range(1, most_new + 1):
        logits = reader.logits()
        ban_repeats(logits, reader.tokens, no_repeat)
        tokens = logits.argmax(-1)
        reader.append(tokens)
        finished = (torch.isin(tokens, ends) | (step == most_new)).cpu()
        for row in finished.nonzero()[:, 0].tolist():
            done[left[row]] = reader.tokens[row, reader.first :].tolist()
        if finished.all():
            break
        if finished.any():
            rows = (~finished).nonzero()[:, 0]
            left = left[rows]
            reader.take(rows.to(tokens.device))
    return done


class Beams:
    """The beams of B prompts that go on, and the best that have ended.

    A beam is a row of the reader; those of a prompt follow each other.
    """

    def __init__(self, count, beams, most_new, device):
        # the sums of log p of running beams, and the scores of ended ones
        self.running, self.best = torch.full((2, count, beams), NEVER, device=device)
        self.running[:, 0] = 0.0  # at first there is one beam
        self.ended = torch.zeros(count, beams, dtype=torch.bool, device=device)  # is there one?
        self.texts = torch.full((count, beams, most_new), -1, device=device)  # their new tokens
        self.left = list(range(count))  # the numbers of the prompts

    def end(self, scores, hits, texts):
        """Keep the best of the ended beams and of candidates (B, beams) that hit an end."""
        self.best, order = torch.cat([self.best, scores], 1).topk(scores.size(1))
        self.ended = torch.cat([self.ended, hits], 1).gather(1, order)
        order = order[..., None].expand(-1, -1, texts.size(2))
        self.texts = torch.cat([self.texts, texts], 1).gather(1, order)

    def can_improve(self, size):
        """May a running beam beat an ended one? (B,) `size`: its length ** length penalty."""
        worst = torch.where(self.ended, self.best.min(1, keepdim=True).values, NEVER)
        return (self.running[:, :1] / size > worst).any(1)

    def take(self, prompts):
        self.running, self.best = self.running[prompts], self.best[prompts]
        self.ended, self.texts = self.ended[prompts], self.texts[prompts]
        self.left = [self.left[i] for i in prompts.tolist()]


def beam_search(reader, ends, no_repeat, most_new, beams, length_penalty):
    """Return the new tokens of each row: the ended beam of the largest sum(log p) / length^penalty.

    The length counts new tokens, with the end. A prompt is done when no running beam, as long as it
    is now, is better than the worst of as many ended ones.
    """
    count, device = len(reader.tokens), reader.tokens.device
    done = [None] * count
    state = Beams(count, beams, most_new, device)
    for step in range(1, most_new + 1):
        log_p = reader.logits().log_softmax(-1)
        ban_repeats(log_p, reader.tokens, no_repeat)  # the others are not normalised again
        if step == 1:
            rows = torch.arange(count, device=device).repeat_interleave(beams)
            log_p = log_p[rows]
            reader.take(rows)
        vocabulary = log_p.size(1)
        sums = (state.running.flatten()[:, None] + log_p).view(len(state.left), -1)  # (B, beams*V)
        candidates = max(2, 1 + len(ends)) * beams  # so many that some of them go on
        sums, places = sums.topk(min(candidates, sums.size(1)))  # (B, K)
        tokens = places % vocabulary
        first = torch.arange(len(state.left), device=device)[:, None] * beams
        rows = first + places // vocabulary  # (B, K), the beam of each candidate
        hits = torch.isin(tokens, ends) | (step == most_new)

        size = step**length_penalty
        ends_here = hits[:, :beams]  # only the best candidates may end
        scores = torch.where(ends_here, sums[:, :beams] / size, NEVER)
        texts = torch.full((len(state.left), beams, most_new), -1, device=device)
        texts[..., : step - 1] = reader.tokens[rows[:, :beams], reader.first :]
        texts[..., step - 1] = tokens[:, :beams]
        state.end(scores, ends_here, texts)
        state.running, order = torch.where(hits, sums + NEVER, sums).topk(beams)
        reader.take(rows.gather(1, order).flatten(), same_prompts=True)
        reader.append(tokens.gather(1, order).flatten())

        goes_on = state.can_improve(size) & ~hits.all(1)
        for i in (~goes_on).nonzero()[:, 0].tolist():
            done[state.left[i]] = [token for token in state.texts[i, 0].tolist() if token >= 0]
        if not goes_on.any():
            break
        if not goes_on.all():
            prompts = goes_on.nonzero()[:, 0]
            state.take(prompts)
            rows = prompts[:, None] * beams + torch.arange(beams, device=device)
            reader.take(rows.flatten())
    return done


# ---------- the model -----------------------------------------------------------------------------


class Causal(nn.Module):
    """A decoder, see `LanguageModel` of models/decoder.py."""

    @torch.no_grad()
    def generate(
        self, prompts, ends, beams=1, length_penalty=1.0, no_repeat=0, most_new=20, cached=True
    ):
        """Return the new tokens of each prompt, a list of ids, as far as one of the ids `ends`.

        The last is among them, unless `most_new` tokens or the positions of the model come before.
        `no_repeat`: so many tokens never follow each other twice, in a prompt and its text; 0: off.
        Raises ValueError for an empty prompt, and for one longer than the positions.
        """
        longest = max(map(len, prompts))
        if not min(map(len, prompts)) or longest > self.config.positions:
            expected = f"expected 1 to {self.config.positions} tokens"
            raise ValueError(f"a prompt has {longest} tokens; {expected}")
        most_new = min(most_new, self.config.positions + 1 - longest)
        reader = Reader(self, prompts, most_new, cached)
        ends = torch.tensor(ends, device=reader.tokens.device)
        if beams == 1:
            return greedy(reader, ends, no_repeat, most_new)
        return beam_search(reader, ends, no_repeat, most_new, beams, length_penalty)

    @contextmanager
    def plain(self):
        """Compute, as long as this lasts, without dropout and with each mask applied once."""
        training = self.training
        self.eval()
        masked = masked_linears(self)
        for name, layer in masked.items():
            linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
            linear.weight = nn.Parameter(layer.masked_weight().detach())
            linear.bias = layer.bias
            self.set_submodule(name, linear)
        try:
            yield
        finally:
            for name, layer in masked.items():
                self.set_submodule(name, layer)
            self.train(training)
