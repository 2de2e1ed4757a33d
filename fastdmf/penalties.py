"""Terms that are added to the objective: one class each, given to ``solve(penalty=...)``."""

__all__ = ["Penalty", "as_penalties"]


class Penalty:
    """What a term supplies: subclasses are frozen dataclasses of their settings."""

    def add(self, problem, x, grad):
        """Return the term's values at ``x`` (B, D), shape (B,) float64, and add its gradient to ``grad`` (B, D).

        ``grad`` holds the gradient of the terms before it: the loss, l2, and the penalties given earlier.
        """
        raise NotImplementedError


def as_penalties(penalty):
    """Return ``penalty``, one object or a sequence of them, as a tuple.

    Raises
    ------
    TypeError
        If one of them is no :class:`Penalty`.
    """
    penalties = (penalty,) if isinstance(penalty, Penalty) else tuple(penalty)
    for one in penalties:
        if not isinstance(one, Penalty):
            raise TypeError(f"penalty must be an object of fastdmf.penalties, or several, got {type(one).__name__}")
    return penalties
