"""Metrics that more than one kind of task has."""

from collections import Counter

import numpy as np


def f1(predicted, labels, positive=1):
    """Return F1 of one class, or 0 where that class is neither predicted nor there."""
    hits = np.sum((predicted == positive) & (labels == positive))
    total = np.sum(predicted == positive) + np.sum(labels == positive)
    return float(2 * hits / total) if total else 0.0


def macro_f1(predicted, labels, count):
    """Return the mean of F1 over `count` classes.

    A class that is neither predicted nor there counts 0, as in sklearn with all labels given.
    """
    hits = np.bincount(labels[predicted == labels], minlength=count)
    totals = np.bincount(predicted, minlength=count) + np.bincount(labels, minlength=count)
    return float(np.mean(2 * hits / np.maximum(totals, 1)))


def pearson(x, y):
    """Return the Pearson correlation in float64, or 0 where one side is constant."""
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x, y):
    """Return the Spearman correlation, which is the Pearson correlation of the ranks."""
    return pearson(ranks(x), ranks(y))


def ranks(x):
    """Return average ranks: equal values share the mean of their places."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def shared_words(words, right):
    """Return F1 of two bags of words, or of two sets; 0 where both are empty."""
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right)) if shared else 0.0


def balanced(labels, classes):
    """Return the weights (K,) of K `classes`, of N labels.

    A class that n labels have weighs N / (n * number of such classes), as in sklearn, and a class
    without an example weighs 0. So the mean over the N labels is 1, and the learning rate keeps its
    meaning.
    """
    counts = np.bincount(labels, minlength=classes)
    there = counts > 0
    return there * len(labels) / np.maximum(counts, 1) / max(1, there.sum())
