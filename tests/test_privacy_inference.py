"""Attribute inference against Bayes' rule and a peer; property inference against permutations and on odd and even."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.tree import DecisionTreeClassifier

from tmlcourse import data, models, privacy

HALVES = torch.tensor([[0.0], [1.0]])


def test_confidence_is_bayes_rule_where_the_model_is_the_truth():
    generator = torch.Generator().manual_seed(0)
    joint = torch.rand(2, 3, 2, generator=generator).double()  # hidden, known, label
    joint /= joint.sum()
    given = joint / joint.sum(2, keepdim=True)  # P(label | hidden, known)
    model = lambda X: given[X[:, 0].long(), X[:, 1].long()]  # noqa: E731
    for known, label in itertools.product(range(3), range(2)):
        prior = joint[:, known].sum(1) / joint[:, known].sum()  # P(hidden | known)
        found = privacy.attribute_inference(model, torch.tensor([[9.0, known]]), torch.tensor([label]), columns=[0],
                                            values=HALVES, prior=prior)  # fmt: skip
        assert torch.allclose(found[0], joint[:, known, label] / joint[:, known, label].sum())


@pytest.fixture(scope="module")
def tree():
    grid = torch.tensor(list(itertools.product([0.0, 1.0], range(5), range(4))))
    generator = torch.Generator().manual_seed(1)
    rows = grid[torch.randint(len(grid), (300,), generator=generator)]
    y = ((rows[:, 0] + rows[:, 1] / 4 + 0.5 * torch.randn(300, generator=generator)) > 1).long()
    return DecisionTreeClassifier(max_depth=4, random_state=0).fit(rows.numpy(), y.numpy()), grid, rows, y


def test_counts_agree_with_a_peer_on_a_grid(tree):
    art = pytest.importorskip("art.attacks.inference.attribute_inference")
    from art.estimators.classification.scikitlearn import ScikitlearnDecisionTreeClassifier

    fitted, grid, _, _ = tree
    prior = [0.4, 0.6]
    attack = art.AttributeInferenceWhiteBoxLifestyleDecisionTree(
        ScikitlearnDecisionTreeClassifier(fitted), attack_feature=0
    )
    known = grid[grid[:, 0] == 0][:, 1:]  # every combination once: their normaliser needs all leaves to be met
    theirs = attack.infer(known.numpy(), values=[0.0, 1.0], priors=prior)
    X = torch.cat([torch.full((len(known), 1), 7.0), known], 1)
    mine = privacy.attribute_inference(
        fitted, X, None, columns=[0], values=HALVES, prior=torch.tensor(prior), method="counts"
    )
    assert np.array_equal(mine.argmax(1).numpy(), theirs.astype(int))


def test_counts_are_the_rows_in_the_leaf(tree):
    fitted, grid, rows, y = tree
    X, labels = grid[[3, 11, 30]], torch.tensor([0, 1, 1])
    found = privacy.attribute_inference(fitted, X, labels, columns=[0], values=HALVES, prior=torch.tensor([0.5, 0.5]),
                                        method="counts")  # fmt: skip
    leaf_of_row, leaf_of_grid = fitted.apply(rows.numpy()), fitted.apply(grid.numpy())
    for i, label in enumerate(labels):
        score = []
        for value in (0.0, 1.0):
            here = X[i].clone()
            here[0] = value
            leaf = fitted.apply(here[None].numpy())[0]
            open_to = np.unique(leaf_of_grid[(grid[:, 0] == value).numpy()])
            own = (y == label).numpy()
            score.append((own & (leaf_of_row == leaf)).sum() / (own & np.isin(leaf_of_row, open_to)).sum())
        assert found[i, 1].item() == pytest.approx(score[1] / sum(score))


def test_a_tree_that_learned_by_heart_betrays_those_it_learned_from():
    table = data.load_table("population")
    columns = [i for i, name in enumerate(table.feature_names) if name.startswith("group=")]
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    inside, outside = order[:1000], order[1000:2000]
    fitted = DecisionTreeClassifier(random_state=0).fit(table.X[inside].numpy(), table.y[inside].numpy())
    prior = table.X[outside][:, columns].mean(0)
    model = lambda rows: torch.from_numpy(fitted.predict_proba(rows.numpy()))  # noqa: E731
    right = []
    for part in (inside, outside):
        found = privacy.attribute_inference(model, table.X[part], table.y[part], columns=columns, values=torch.eye(3),
                                            prior=prior)  # fmt: skip
        right.append((found.argmax(1) == table.X[part][:, columns].argmax(1)).double().mean().item())
    assert right[0] > right[1] + 0.03 and right[0] > prior.max() + 0.03


def test_what_stands_in_the_hidden_column_does_not_matter(tree):
    fitted, grid, _, _ = tree
    answers = lambda X: torch.from_numpy(fitted.predict_proba(X.numpy()))  # noqa: E731
    options = dict(columns=[0], values=HALVES, prior=torch.tensor([0.2, 0.8]))
    for method, model in (("counts", fitted), ("confidence", answers)):
        rows = [torch.cat([torch.full((40, 1), v), grid[:, 1:]], 1) for v in (0.0, 5.0)]
        a, b = (privacy.attribute_inference(model, X, torch.zeros(40).long(), method=method, **options) for X in rows)
        assert torch.equal(a, b) and torch.allclose(a.sum(1), torch.ones(40).double())


def test_features_do_not_see_the_order_of_hidden_units():
    net = models.mlp((1, 2, 2), 3, hidden=(5, 4), seed=0).double()
    weights = {name: p.detach()[None] for name, p in net.named_parameters()}
    mixed, order = dict(weights), None
    for layer, units in ((1, 5), (3, 4)):
        w = weights[f"{layer}.weight"] if order is None else weights[f"{layer}.weight"][:, :, order]
        order = torch.randperm(units, generator=torch.Generator().manual_seed(layer))
        mixed[f"{layer}.weight"], mixed[f"{layer}.bias"] = w[:, order], weights[f"{layer}.bias"][:, order]
    mixed["5.weight"] = weights["5.weight"][:, :, order]
    assert not torch.equal(mixed["1.weight"], weights["1.weight"])
    assert torch.allclose(privacy.neuron_features(mixed), privacy.neuron_features(weights))
    assert privacy.neuron_features(weights).shape == (1, sum(p.numel() for p in net.parameters()))


def test_a_network_for_odd_and_even_betrays_how_many_fours_it_saw():
    train = data.load("digits", "train")
    four = train.y == 4
    even, odd = (train.y % 2 == 0) & ~four, train.y % 2 == 1
    holds, generator = torch.arange(72) % 2 == 0, torch.Generator().manual_seed(0)
    members = torch.zeros(72, len(train), dtype=torch.bool)
    for i, many in enumerate(holds):
        k = 70 if many else 30
        for part, n in ((four, k), (even, 140 - k), (odd, 140)):
            rows = part.nonzero()[:, 0]
            members[i, rows[torch.randperm(len(rows), generator=generator)[:n]]] = True
    pool = SimpleNamespace(x=train.x, y=train.y % 2)
    build = lambda seed: models.mlp(train.shape, 2, hidden=(10,), seed=seed)  # noqa: E731
    shadows = privacy.train_shadows(build, pool, n=72, members=members, epochs=8, batch_size=40, lr=1e-2, seed=0)
    answers = shadows.logits(data.load("digits", n=150).x).softmax(2).flatten(1)
    found = privacy.property_inference(answers[:48], holds[:48], answers[48:])
    assert ((found > 0.5) == holds[48:]).float().mean() > 0.85


def test_bad_input_is_named(tree):
    fitted, grid, _, _ = tree
    options = dict(columns=[0], values=HALVES, prior=torch.tensor([0.5, 0.5]))
    y = torch.zeros(40).long()
    for change, message in (
        (dict(columns=[3]), "X, columns"), (dict(values=torch.eye(2)), "values"), (dict(method="guess"), "method"),
        (dict(prior=torch.tensor([0.5, 0.2])), "prior"), (dict(prior=torch.tensor([0.0, 1.0])), "prior"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            privacy.attribute_inference(fitted, grid, y, **({"method": "counts"} | options | change))
    with pytest.raises(ValueError, match="y: got None"):
        privacy.attribute_inference(lambda X: X, grid, None, **options)
    with pytest.raises(ValueError, match="holds"):
        privacy.property_inference(torch.rand(3, 2), torch.ones(3, dtype=torch.bool), torch.rand(1, 2))
    with pytest.raises(ValueError, match="attacked"):
        privacy.property_inference(torch.rand(2, 2), torch.tensor([True, False]), torch.rand(1, 3))
    with pytest.raises(ValueError, match="linear layers alone"):
        privacy.neuron_features({"0.weight": torch.rand(2, 3, 1, 5, 5), "0.bias": torch.rand(2, 3)})
