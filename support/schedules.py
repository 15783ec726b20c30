"""What changes over the steps of a run: the density, lambda, tau, and the learning rate."""


def cubic_at(step, first, last, start, end, power=3):
    """Return `first` until step `start`, `last` from step `end`, and a cubic curve between them.

    With `power` 1 the curve is a line.

    1.0 |***
        |   *
        |     **
      v |        *********
        +--+-----+-------+
        0  start end     T

    It is the density of the methods that have one (1 to v), soft movement's tau (0 to 0.1), and
    SMP's lambda (0 to 400).
    """
    if step <= start:
        return first
    if step >= end:
        return last
    left = 1 - (step - start) / (end - start)
    return last + (first - last) * left**power


def lr_at(step, total_steps, warmup):
    """Return the factor of the learning rate.

    It rises from 0 over `warmup`, a fraction of the run, then falls to 0 at the end; both linearly.
    """
    rise = warmup * total_steps
    return step / rise if step < rise else (total_steps - step) / (total_steps - rise)
