"""Attribute and property inference: what a model says about a hidden attribute of one person, and about all its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import checks


def attribute_inference(
    model,
    X: Tensor,
    y: Tensor | None,
    *,
    columns: Sequence[int],
    values: Tensor,
    prior: Tensor,
    method: str = "confidence",
) -> Tensor:
    """P(hidden attribute = v | the rest of the row, the label) for each value v, as far as the model betrays it.

    Each value in turn is written into the row, x_v, and the model is asked how well the row fits now:

    - "confidence": prior(v) p_y(x_v), for any model that answers with probabilities (after Fredrikson et al. 2014).
    - "counts": prior(v) n(leaf of x_v) / n(leaves open to v), for a decision tree that is published with the number of
      training rows in its leaves, of class y if a label is given (Fredrikson et al. 2015, "white-box with counts").

    Args:
        model: rows (N, d) -> probabilities (N, K), tensors; for "counts" a fitted scikit-learn `DecisionTreeClassifier`.
        X: rows (N, d), whatever stands in the hidden columns; y: int64 labels (N,), or None with "counts".
        columns: where the attribute stands (c of them); values: (V, c), what each value writes there, e.g. `torch.eye(V)`.
        prior: (V,) probabilities, positive; method: as above.
    Returns: (N, V), rows with the sum 1; a row that fits no value gets the prior.
    Raises: TypeError, ValueError: bad input.
    Example: `attribute_inference(lambda X: torch.full((len(X), 2), 0.5), torch.zeros(3, 2), torch.zeros(3).long(),
        columns=[0], values=torch.tensor([[0.0], [1.0]]), prior=torch.tensor([0.3, 0.7]))[0]` is the prior.
    """
    checks.choice(method, "method", ("confidence", "counts"))
    columns, prior = list(columns), torch.as_tensor(prior, dtype=torch.float64)
    if X.dim() != 2 or not len(X) or not all(0 <= c < X.shape[1] for c in columns) or not columns:
        raise ValueError(
            f"X, columns: got shape {tuple(X.shape)} and {columns}, want rows (N, d) and columns in [0, d)"
        )
    if values.dim() != 2 or values.shape[1] != len(columns) or len(values) < 2:
        raise ValueError(f"values: got shape {tuple(values.shape)}, want (V, {len(columns)}) with V >= 2")
    if prior.shape != (len(values),) or not (prior > 0).all() or abs(float(prior.sum()) - 1) > 1e-6:
        raise ValueError(f"prior: got {prior.tolist()}, want {len(values)} positive probabilities with the sum 1")
    if y is None and method == "confidence":
        raise ValueError("y: got None, want labels for method='confidence'")
    if y is not None:
        checks.labels(y, X)
    score = torch.empty(len(X), len(values), dtype=torch.float64)
    for v, value in enumerate(values):
        rows = X.clone()
        rows[:, columns] = value.to(X)
        if method == "confidence":
            p = model(rows)
            if not isinstance(p, Tensor) or p.dim() != 2 or len(p) != len(X) or y.max() >= p.shape[1]:
                raise ValueError(f"model: got {getattr(p, 'shape', type(p))}, want probabilities ({len(X)}, K), K > y")
            score[:, v] = p.detach()[torch.arange(len(y)), y]
        else:
            score[:, v] = _counts(model, rows.cpu().numpy(), y, columns, value.tolist())
    score *= prior
    total = score.sum(1, keepdim=True)
    return torch.where(total > 0, score / total.clamp_min(1e-300), prior)


def _counts(tree, rows: np.ndarray, y, columns: list[int], value: list[float]) -> Tensor:
    """n(leaf of each row) / n(all leaves that rows with this value can reach), rows of class y where it is given."""
    t = tree.tree_
    each = (
        t.value[:, 0] / t.value[:, 0].sum(1, keepdims=True) * t.n_node_samples[:, None]
    )  # rows of each class in a node
    fixed, open_to, stack = dict(zip(columns, value, strict=True)), [], [0]
    while stack:
        node = stack.pop()
        left, right, feature = t.children_left[node], t.children_right[node], t.feature[node]
        if left < 0:
            open_to.append(node)
        elif feature in fixed:
            stack.append(left if np.float32(fixed[feature]) <= t.threshold[node] else right)
        else:
            stack += [left, right]
    leaf = tree.apply(rows)
    if y is None:
        n, total = each[leaf].sum(1), each[open_to].sum()
    else:
        k = np.searchsorted(tree.classes_, y.cpu().numpy())
        n, total = each[leaf, k], each[open_to].sum(0)[k]
    return torch.from_numpy(n / np.maximum(total, 1e-300))


def neuron_features(weights: Mapping[str, Tensor]) -> Tensor:
    """Fully connected networks as rows of numbers that do not depend on the order of their hidden units.

    Permuting hidden units leaves the function as it is, and would hide from a classifier what it looks for. So the units of
    each hidden layer are sorted by the sum of their incoming weights, and the next layer's columns with them.

    Args: weights: stacked, name -> (M, ...), "weight" (M, h, d) and "bias" (M, h) of each linear layer in turn.
    Returns: (M, number of parameters).
    Raises: ValueError for other layers.
    Source: Ganju et al. 2018, section 4.1 (neuron sorting).
    Example: `neuron_features({"0.weight": torch.rand(3, 4, 2), "0.bias": torch.rand(3, 4)}).shape` is (3, 12).
    """
    pairs = [
        (w, weights.get(name[: -len("weight")] + "bias")) for name, w in weights.items() if name.endswith("weight")
    ]
    if not pairs or any(w.dim() != 3 or b is None or b.shape != w.shape[:2] for w, b in pairs):
        raise ValueError(
            f"weights: got {[*weights]}, want linear layers alone, each with weight (M, h, d) and bias (M, h)"
        )
    rows, order = [], None
    for number, (w, b) in enumerate(pairs):
        if order is not None:
            w = w.gather(2, order[:, None].expand_as(w))
        if number < len(pairs) - 1:
            order = w.sum(2).argsort(1)
            w, b = w.gather(1, order[..., None].expand_as(w)), b.gather(1, order)
        rows += [w.flatten(1), b]
    return torch.cat(rows, 1)


def property_inference(known: Tensor, holds: Tensor, attacked: Tensor, *, strength: float = 1e-2) -> Tensor:
    """The probability that a property holds for the training data of each attacked network, from what is known of it.

    The attacker trains networks on data with the property and without (`train_shadows`), and logistic regression on their
    standardised features learns to tell them apart. Features are whatever the attacker sees: the weights
    (`neuron_features`), or only the answers to some images of his own (`shadows.logits(x).softmax(2).flatten(1)`).

    Args:
        known: features (M, F) of the attacker's networks. holds: bool (M,), whether each one's data have the property.
        attacked: features (A, F) of the networks that are asked about.
        strength: the inverse of the weight of the squared norm in the regression (> 0).
    Returns: (A,) float64 in [0, 1].
    Raises: TypeError, ValueError: bad input; a property that all or none have.
    Source: Ateniese et al. 2015; Ganju et al. 2018.
    Example: `property_inference(torch.tensor([[0.0], [1.0]]), torch.tensor([False, True]), torch.ones(1, 1))`.
    """
    from sklearn.linear_model import LogisticRegression

    checks.positive(strength, "strength")
    for name, rows in (("known", known), ("attacked", attacked)):
        if rows.dim() != 2 or not rows.numel() or not torch.isfinite(rows).all() or rows.shape[1] != known.shape[-1]:
            raise ValueError(f"{name}: got {tuple(rows.shape)}, want finite features (networks, F), F the same in both")
    if holds.dtype != torch.bool or holds.shape != (len(known),) or holds.all() or not holds.any():
        raise ValueError(
            f"holds: got {holds.dtype} {tuple(holds.shape)}, want torch.bool ({len(known)},) with both values"
        )
    train, test = known.double().cpu(), attacked.double().cpu()
    mean, spread = train.mean(0), train.std(0).clamp_min(1e-9)
    meta = LogisticRegression(C=strength, max_iter=1000).fit(((train - mean) / spread).numpy(), holds.cpu().numpy())
    return torch.from_numpy(meta.predict_proba(((test - mean) / spread).numpy())[:, 1])
