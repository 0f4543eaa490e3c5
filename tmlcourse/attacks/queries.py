"""The only door to a model for black-box attacks: it answers, it counts, and it closes when the budget is spent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks
from ..layout import channels_last

_UNLIMITED = torch.iinfo(torch.int64).max


class BudgetExceeded(RuntimeError):
    """An image would have been asked about more often than its budget allows; nothing was asked."""


class Queries:
    """A model behind a counter: `oracle(x, index)` answers for the rows x and charges row r to the image index[r].

    One row is one query. Nothing else of the model can be had through this object: answers carry no gradient, and the
    function itself is kept in a closure, out of reach of attribute look-up. One object serves one set of images, image i
    having account i, and may be handed to several attacks one after the other; their queries add up.

    Args:
        predict: images -> scores (N, K), larger for likelier classes; with answers="labels" also -> int64 labels (N,). Or
            another `Queries`: then each question passes, and is charged at, both doors.
        budget: queries allowed for each image (>= 0), or None.
        answers: "scores" (N, K), or "labels" (N,): the class of the largest score and nothing more.
    Raises:
        BudgetExceeded: before asking, if any image would exceed its budget.
    Example: `oracle = Queries(model, budget=500); x_adv = square(oracle, x, y, Linf(0.1)); print(oracle.count)`.
    """

    __slots__ = ("_ask", "_facts", "left")

    def __init__(self, predict: Callable, *, budget: int | None = None, answers: str = "scores"):
        if not callable(predict):
            raise TypeError(f"predict: got {type(predict).__name__}, want a callable that returns scores (N, K)")
        budget = None if budget is None else checks.positive_int(budget, "budget", least=0)
        checks.choice(answers, "answers", ("scores", "labels"))
        inner = isinstance(predict, Queries)
        if inner and answers == "scores" and predict.answers == "labels":
            raise ValueError("predict: got Queries that answer with labels, want scores")
        run, count = predict if inner else _runner(predict), torch.zeros(0, dtype=torch.int64)

        def grow(n: int) -> Tensor:
            nonlocal count
            count = torch.cat([count, count.new_zeros(max(0, n - len(count)))])
            return count

        def left(n: int) -> Tensor:
            """How many more queries each of the first n images has: int64 (n,), on the CPU."""
            own = torch.full((n,), _UNLIMITED) if budget is None else budget - grow(n)[:n]
            return torch.minimum(own, predict.left(n)) if inner else own

        def ask(x: Tensor, index: Tensor | None) -> Tensor:
            index = torch.arange(len(x)) if index is None else index
            if index.shape != x.shape[:1] or index.dtype != torch.int64 or (len(x) and index.min() < 0):
                raise ValueError(
                    f"index: got {index.dtype} {tuple(index.shape)}, want an image number >= 0 for each row"
                )
            if not len(x):
                raise ValueError("x: got no row, want at least one")
            asked = torch.bincount(index.cpu())
            over = asked > left(len(asked))
            if over.any():
                raise BudgetExceeded(
                    f"image {over.nonzero()[0].item()} and {int(over.sum()) - 1} others have no query left"
                )
            with torch.no_grad():
                if not inner:
                    checks.model(predict, x)
                grow(len(asked))[: len(asked)] += asked
                answer = run(x.detach(), index)
            if answers == "labels":
                return answer if answer.dim() == 1 else answer.argmax(1)
            if answer.dim() != 2:
                raise ValueError(f"predict: got answers {tuple(answer.shape)}, want scores ({len(x)}, K)")
            return answer

        self._ask, self._facts, self.left = ask, lambda: (count, budget, answers), left

    def __call__(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Answers for the rows x; row r is charged to image index[r] (int64), without index to image r."""
        return self._ask(x, index)

    @property
    def count(self) -> Tensor:
        """Queries spent on each image so far: int64 (n,), a copy on the CPU."""
        return self._facts()[0].clone()

    @property
    def total(self) -> int:
        """Queries spent on all images together."""
        return int(self._facts()[0].sum())

    @property
    def budget(self) -> int | None:
        """Queries allowed for each image."""
        return self._facts()[1]

    @property
    def answers(self) -> str:
        """ "scores" or "labels"."""
        return self._facts()[2]


def open_door(predict: Callable, x: Tensor, queries: int, *, answers: str = "scores") -> Queries:
    """The door that an attack on the images x uses: its own budget of `queries` an image, around `predict` as given.

    A `Queries` given by the caller stays in force: its counts grow along, its smaller budget wins (see `left`).
    """
    if not isinstance(predict, Queries):
        checks.model(predict, x)
    return Queries(predict, budget=checks.positive_int(queries, "queries", least=0), answers=answers)


def _runner(predict: Callable) -> Callable[[Tensor, Tensor], Tensor]:
    """`predict` over slices that fit the caches; on a CPU a convolutional network gets its images channels last."""
    fast = isinstance(predict, nn.Module) and any(isinstance(m, nn.Conv2d) for m in predict.modules())

    def one(x: Tensor) -> Tensor:
        nonlocal fast
        if fast and x.dim() == 4 and x.device.type == "cpu":
            try:
                return predict(channels_last(x))
            except RuntimeError:  # a model that calls `view` on its features
                fast = False
        return predict(x.contiguous())

    def run(x: Tensor, index: Tensor) -> Tensor:
        answer = torch.cat([one(part).detach() for part in x.split(64 if x.device.type == "cpu" else 8192)])
        if len(answer) != len(x):
            raise ValueError(f"predict: got {len(answer)} answers for {len(x)} rows, want one a row")
        return answer

    return run
