"""Label flips: at random, and where they hurt most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks, progress
from .kkt import _fit, _gradient
from .learners import Learner, logistic, scores
from .sets import examples


def flip_labels(
    x: Tensor,
    y: Tensor,
    *,
    count: int,
    how: str = "adversarial",
    learner: Learner | None = None,
    risk: Callable[[Tensor], Tensor] | None = None,
    effort: float = 0.0,
    tries: int = 5,
    seed: int = 0,
) -> Tensor:
    """Flip the labels of at most `count` examples of two classes.

    "random": `count` of them by chance. "adversarial": one after the other. The implicit gradient of the attacker's risk with
    respect to the labels, dR_A/dy = (dmodel/dy)^T dR_A/dmodel, ranks them; the `tries` most promising are flipped and the
    learner retrained; the best stays. At the end single flips are exchanged or taken back where that helps.

    Args:
        x: (n, ...) floating point; y: int64 labels (n,) of two classes; count: 0 to n.
        how: "adversarial" or "random".
        learner: who is attacked, `logistic(1.0)` without; a `Learner` with signs.
        risk: R_A, model (d + 1,) -> scalar that the attacker makes small; without, minus the learner's loss log(1 + exp(-m))
            on the clean labels.
        effort: weight of the cost ||y' - y||^2 / 2 of labels -1 and 1: two a flip.
        seed: of the random flips.
    Returns: the new labels (n,); fewer than `count` differ where further flips would not help.
    Raises: TypeError, ValueError: bad input.
    Source: Biggio, Nelson & Laskov 2011; Zhao et al. 2017 for the gradient with respect to labels.
    Example: `int((flip_labels(x, y, count=5, how="random") != y).sum())` is 5.
    """
    rows, signs, labels = examples(x, y)
    n = len(rows)
    checks.positive_int(count, "count", least=0)
    if count > n:
        raise ValueError(f"count: got {count}, want at most {n}, the number of examples")
    checks.choice(how, "how", ("adversarial", "random"))
    checks.positive_int(seed, "seed", least=0)
    if how == "random":
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].to(y.device)
        flipped = torch.zeros(n, dtype=torch.bool, device=y.device)
        flipped[order] = True
    else:
        learner = logistic(1.0) if learner is None else learner
        if not isinstance(learner, Learner) or not learner.signs:
            raise TypeError(f"learner: got {getattr(learner, 'name', learner)!r}, want a Learner of labels -1 and 1")
        checks.nonnegative(effort, "effort")
        checks.positive_int(tries, "tries")
        if risk is None:
            risk = lambda model: -F.softplus(-signs * scores(model, rows)).mean()  # noqa: E731
        flipped = _worst_flips(learner, rows, signs, risk, count, 2 * effort, tries)
    other = torch.where(y == labels[0], labels[1], labels[0])
    return torch.where(flipped, other, y)


class _Search:
    """Sets of flips, as bool (n,), and what each makes of a learner, trained once."""

    def __init__(self, learner, rows, signs, risk, price: float, tries: int):
        self.learner, self.rows, self.signs, self.risk = learner, rows, signs, risk
        self.price, self.tries, self.seen = price, tries, {}
        self.clean = torch.zeros_like(signs, dtype=torch.bool)

    def train(self, flipped: Tensor):
        """(objective, fit); infinite where a class has no example left."""
        key = flipped.cpu().numpy().tobytes()
        if key not in self.seen:
            y = torch.where(flipped, -self.signs, self.signs)
            if (y == y[0]).all():
                return float("inf"), None
            solved = _fit(self.learner, self.rows, y, None)
            self.seen[key] = float(self.risk(solved.model)) + self.price * int(flipped.sum()), solved
        return self.seen[key]

    def value(self, flipped: Tensor) -> float:
        return self.train(flipped)[0]

    def promising(self, flipped: Tensor) -> list[int]:
        """Further flips that promise most, by the gradient."""
        solved = self.train(flipped)[1]
        if solved is None:
            return []
        gain = 2 * solved.y * _gradient(solved, self.risk, strict=False)[2]
        return torch.where(flipped, -float("inf"), gain).argsort(descending=True)[: self.tries].tolist()

    def best(self, flipped: Tensor, changes) -> Tensor:
        """The best of `flipped` and itself with each tuple of indices changed."""
        found = [flipped]
        for indices in changes:
            new = flipped.clone()
            new[list(indices)] ^= True
            found.append(new)
        return min(found, key=self.value)

    def climb(self, count: int, width: int = 3) -> Tensor:
        """Flip one after the other, whether or not one alone helps, from the `width` best sets so far; the best set met."""
        best, beam = self.clean, [self.clean]
        for _ in progress.bar(range(count), desc="label flips"):
            longer = {}
            for flipped in beam:
                for i in self.promising(flipped):
                    new = flipped.clone()
                    new[i] = True
                    longer[new.cpu().numpy().tobytes()] = new
            if not longer:
                break
            beam = sorted(longer.values(), key=self.value)[:width]
            best = min(best, beam[0], key=self.value)
        return best

    def exchange(self, flipped: Tensor, rounds: int, guides) -> Tensor:
        """Take back single flips or exchange them, for what the guides find promising, while that helps."""
        for _ in range(rounds):
            changes = []
            for i in flipped.nonzero().squeeze(1).tolist():
                without = flipped.clone()
                without[i] = False
                others = {j for guide in guides for j in guide.promising(without)} - {i}
                changes += [(i,), *((i, j) for j in sorted(others))]
            best = self.best(flipped, changes)
            if best.equal(flipped):
                break
            flipped = best
        return flipped


def _worst_flips(learner, rows, signs, risk, count: int, price: float, tries: int) -> Tensor:
    """The smoother stages of a learner with kinks show the way; the learner itself decides."""
    guides = [_Search(stage, rows, signs, risk, price, tries) for stage in (*learner.stages[:3], learner)]
    search = guides[-1]
    found = [search.exchange(guide.climb(count), min(count, 5), guides) for guide in guides]
    return min(found, key=search.value)
