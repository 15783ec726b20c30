"""Variants that the papers compare with or that explain a result, made like a fork would make them.

    python -m tools.variants --method smp-global --task stsb ...      flags as of train.py

- smp-global ranks the scores of all matrices together (SMP, Table 3, function G).
- smp-head has a new output head that is trained, in place of the frozen label words.
- smp-words keeps the label words and trains the head that they are read with.
- dense-frozen and pins-frozen are dense fine-tuning and PINS with frozen embeddings. Movement
  pruning freezes them, too. Most weights of a small BERT are embeddings.

Each is a class beside those of prune.py. What is trained has the learning rate --lr.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so it runs from any folder

import support.terminal  # noqa: F401  (first: it says "loading torch")

import torch

from prune import METHODS, Dense, Pins, SMPLocal, SMPShared
from support.selection import top_k_masks


class SMPGlobal(SMPLocal):
    """Keep the largest scores of the whole encoder, wherever they are."""

    @torch.no_grad()
    def update(self, step):
        scores = torch.cat([linear.scores.flatten() for linear in self.linears])
        width = self.linears[0].in_features
        count = torch.full((1,), self.density(step) * self.size, device=scores.device)
        table = scores.view(1, -1, width)  # (N) -> (1, N / width, width)
        (mask,), wrong = top_k_masks(table, count)
        self.wrong |= wrong
        sizes = [linear.weight.numel() for linear in self.linears]
        for linear, part in zip(self.linears, mask.flatten().split(sizes)):
            linear.mask = part.view_as(linear.weight)  # (numel,) -> (out, in)


class SMPHead(SMPShared):
    """SMP-S with a new output head, which is trained like that of dense fine-tuning."""

    output_head = "classifier"

    def freeze(self):
        inside = ("bert.encoder.", "bert.embeddings.")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.startswith(inside))


class SMPWords(SMPHead):
    """SMP-S with the label words. The MLM head is trained, the words' embeddings are not."""

    output_head = "words"


class DenseFrozen(Dense):
    """Dense fine-tuning, but with frozen embeddings."""

    def freeze(self):
        self.model.embeddings.requires_grad_(False)


class PinsFrozen(Pins):
    """PINS, but with frozen embeddings."""

    def freeze(self):
        self.model.embeddings.requires_grad_(False)


METHODS |= {"smp-global": SMPGlobal, "smp-head": SMPHead, "smp-words": SMPWords}
METHODS |= {"dense-frozen": DenseFrozen, "pins-frozen": PinsFrozen}

from train import Settings, main  # noqa: E402  (its flags show the methods above)

__all__ = ["Settings", "main"]

if __name__ == "__main__":
    sys.exit(main())
