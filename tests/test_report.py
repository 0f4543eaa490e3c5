"""The trust report: each section sees what was planted for it, says when it cannot see, and the page stands alone."""

import copy
import math
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

from tmlcourse import attacks, data, models, poisoning, report, training
from tmlcourse.defenses import BitDepth
from tmlcourse.intervals import clopper_pearson
from tmlcourse.report import expected_calibration_error, leaderboard, side_by_side, trust_report
from tmlcourse.report.sections import VERDICTS, _auc_interval, _gap_by_chance, _ideal_errors
from tmlcourse.threat import L1, Linf

TRAIN, TEST = data.load("digits", "train"), data.load("digits")
CORNER = poisoning.pattern_trigger(TRAIN.shape, margin=0)
SIDES = np.array(["left", "right"])[np.arange(len(TEST)) % 2]


def trained(on=TRAIN, seed=0, **options):
    model = models.mlp(TRAIN.shape, hidden=(64, 32), seed=seed)
    training.fit(model, on, **{"epochs": 10, "lr": 3e-3, "seed": seed} | options)
    return model


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def usual(model):
    return trust_report(model, TEST, train=TRAIN, threat=Linf(0.05), groups=SIDES, n=50, name="usual")


@pytest.fixture(scope="module")
def pictures(usual):
    return report.page.figures(usual)


# ---- the whole


def test_every_section_answers_and_every_row_is_whole(usual):
    table = usual.table
    assert list(table.columns) == ["section", "what", "value", "low", "high", "n", "verdict", "comment", "seconds"]
    assert list(dict.fromkeys(table.section)) == [
        "clean", "attacked", "certified", "backdoor", "leakage", "calibration", "gaps", "explanations"
    ]  # fmt: skip
    assert set(table.verdict) <= set(VERDICTS) - {"not measured"}
    assert table.what.is_unique and (table.comment.str.len() > 5).all() and (table.seconds >= 0).all()
    known = table[table.low.notna()]
    assert (known.low <= known.value).all() and (known.value <= known.high).all()
    assert (table.n > 0).all() and table.value.notna().all()


def test_clean_accuracy_and_interval_are_those_of_a_count(model, usual):
    with torch.no_grad():
        right = (model(TEST.x).argmax(1) == TEST.y).sum().item()
    row = usual["accuracy"]
    drawn = row.n == min(len(TEST), 250)
    assert drawn and (row.low, row.high) == clopper_pearson(round(row.value * row.n), row.n)
    everything = trust_report(model, TEST, sections=(), n=80)["accuracy"]
    assert everything.n == len(TEST) and everything.value == pytest.approx(right / len(TEST), abs=1e-12)


def test_the_sandwich(usual):
    clean = float((usual.seen["logits"].argmax(1)[:50] == usual.seen["y"]).float().mean())
    proved = max(usual["proved by intervals"].value, usual["proved by CROWN"].value)
    worst = usual["the worst of all"].value
    assert 0 < proved <= worst <= min(usual["PGD"].value, usual["Square"].value) <= clean
    assert usual["neither"].value >= worst - proved - 1e-9
    assert Linf(0.05).contains(usual.seen["x_adv"], usual.seen["x"]).all()


@pytest.mark.parametrize(
    "blunt", [("pgd", "square"), ("pgd", "apgd", "apgd_targeted"), ("square", "apgd", "apgd_targeted")]
)
def test_what_any_attack_breaks_is_broken(model, monkeypatch, blunt):
    for name in blunt:
        monkeypatch.setattr(report.sections, name, lambda model, x, y, threat, **options: x)
    found = trust_report(model, TEST, sections=["attacked"], n=40, threat=Linf(0.2))
    with torch.no_grad():
        right = model(found.seen["x_adv"]).argmax(1) == found.seen["y"]
    assert torch.equal(right, found.seen["standing"])
    assert found["the worst of all"].value == pytest.approx(float(right.float().mean())) and right.float().mean() < 0.6


def test_the_same_seed_gives_the_same_report_and_the_model_and_torchs_generator_are_left_alone(model, usual):
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    wants = [p.requires_grad for p in model.parameters()]
    again = trust_report(model, TEST, train=TRAIN, threat=Linf(0.05), groups=SIDES, n=50, name="usual")
    pd.testing.assert_frame_equal(again.table.drop(columns="seconds"), usual.table.drop(columns="seconds"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wants and not model.training
    assert report.page._picture(again.figures()["calibration"]) == report.page._picture(usual.figures()["calibration"])


# ---- each section sees what was planted


def test_an_undefended_network_raises_the_alarm_and_a_constant_one_is_proved(model):
    assert (
        trust_report(model, TEST, sections=["attacked"], n=20, threat=Linf(0.4))["the worst of all"].verdict == "alarm"
    )
    steady = models.linear(TEST.shape, seed=0)
    with torch.no_grad():
        steady[1].weight.mul_(1e-6), steady[1].bias.copy_(torch.arange(10.0))
    nines = SimpleNamespace(x=TEST.x[TEST.y == 9], y=TEST.y[TEST.y == 9])
    found = trust_report(steady, nines, sections=["attacked", "certified", "gaps"], n=20, threat=Linf(0.4))
    assert found["proved by CROWN"].value == found["the worst of all"].value == 1
    assert found["accuracy by class"].verdict == "not measured" and "9" in found["accuracy by class"].comment


def test_a_hidden_gradient_is_noticed(model):
    hidden = nn.Sequential(BitDepth(3), *copy.deepcopy(model)).eval()
    found = trust_report(hidden, TEST, sections=["attacked", "certified"], n=60, threat=Linf(0.2))
    assert found["Square"].verdict == "alarm" and "masked" in found["Square"].comment
    assert "layer '0' (BitDepth)" in found["share proved"].comment and found["share proved"].verdict == "not measured"


def test_a_planted_backdoor_is_named_and_a_clean_network_is_not_accused(model, usual):
    victim = trained(poisoning.backdoor(TRAIN, CORNER, target=4, fraction=0.1, seed=0), epochs=15)
    assert poisoning.attack_success(victim, TEST.x, TEST.y, CORNER, 4) > 0.9
    found = trust_report(victim, TEST, sections=["backdoor"], n=60, effort=2)
    assert found["classes flagged"].verdict == "alarm" and found.seen["cleansed"].flagged == [4]
    assert found["accuracy"].value > 0.85
    assert usual["classes flagged"].verdict != "alarm" and usual["classes flagged"].value == 0


def test_a_network_that_memorised_leaks_and_one_that_never_saw_them_does_not(model):
    few = TRAIN[:120]
    generator = torch.Generator().manual_seed(0)
    noisy = SimpleNamespace(x=few.x, y=torch.randint(10, (120,), generator=generator))
    parrot = models.mlp(TRAIN.shape, hidden=(256,), seed=0)
    training.fit(parrot, noisy, epochs=60, lr=5e-3, batch_size=40, seed=0)
    fresh = SimpleNamespace(x=TEST.x, y=torch.randint(10, (len(TEST),), generator=generator))
    row = trust_report(parrot, fresh, train=noisy, sections=["leakage"], n=60)["AUC"]
    assert row.verdict == "alarm" and row.value > 0.9
    strangers = trust_report(model, TEST[:180], train=TEST[180:], sections=["leakage"], n=40)["AUC"]
    assert strangers.verdict == "fine" and strangers.low <= 0.5


def test_the_interval_of_the_area_covers_it():
    rng = np.random.default_rng(0)
    truth = 0.760250  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    covered = 0
    for _ in range(200):
        s = np.concatenate([rng.normal(1, 1, 40), rng.normal(0, 1, 60)])
        low, high = _auc_interval(roc_auc_score(np.arange(100) < 40, s), 40, 60)
        covered += low <= truth <= high
    assert covered >= 180


def test_a_gap_between_groups_is_told_from_chance(model):
    with torch.no_grad():
        wrong = model(TEST.x).argmax(1) != TEST.y
    unlucky = torch.where(wrong, 1, torch.arange(len(TEST)) % 2).numpy()
    found = trust_report(model, TEST, groups=unlucky, sections=["gaps"], n=80)
    assert found["largest gap between two groups"].verdict == "caution"
    assert found["lowest accuracy of a group"].comment == "Group 1."
    codes = np.arange(40) % 2
    gap, p = _gap_by_chance(codes, np.array([1.0, 0.0] * 20), 0)
    assert gap == 1 and p == pytest.approx(1 / 1001)
    assert _gap_by_chance(codes, np.ones(40), 0) == (0, 1)


def test_explanations_of_a_linear_network_add_up_and_change(model):
    found = trust_report(models.linear(TEST.shape, seed=0), TEST, sections=["explanations"], n=20)
    assert found["integrated gradients"].value < 1e-5 and found["integrated gradients"].verdict == "fine"
    assert abs(found["gradient map, signed"].value) < 0.5


# ---- calibration


def test_the_calibration_error_by_hand():
    """Two bins: (0.5, 0.6] with mean 0.55 and 1 of 2 right; (0.9, 1] with mean 0.95 and 4 of 4: 2/6 * 0.05 + 4/6 * 0.05."""
    p, hit = [0.52, 0.58, 0.95, 0.95, 0.92, 0.98], [True, False, True, True, True, True]
    error, table = expected_calibration_error(p, hit)
    assert error == pytest.approx(2 / 6 * 0.05 + 4 / 6 * 0.05, abs=1e-12)
    assert table.n.tolist() == [2, 4] and table.observed.tolist() == [0.5, 1.0]
    assert table.score.tolist() == pytest.approx([0.55, 0.95])


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 12))
def test_the_calibration_error_equals_a_loop(pairs, bins):
    p, hit = (np.array(v) for v in zip(*pairs, strict=True))
    total, edges = 0.0, np.arange(bins + 1) / bins
    for i in range(bins):
        mine = (p > edges[i] + 1e-9 / bins) & (p <= edges[i + 1] + 1e-9 / bins)
        if i == 0:
            mine |= p <= edges[0] + 1e-9 / bins
        total += abs((hit[mine] - p[mine]).sum())
    assert expected_calibration_error(p, hit, bins=bins)[0] == pytest.approx(total / len(p), abs=1e-9)


def test_honest_probabilities_are_seldom_accused():
    rng, accused = np.random.default_rng(0), 0
    for seed in range(60):
        p = rng.uniform(0.5, 1, 200)
        accused += expected_calibration_error(p, rng.random(200) < p)[0] > _ideal_errors(p, seed)
    assert accused <= 6
    assert expected_calibration_error(p, np.zeros(200, bool))[0] > 3 * _ideal_errors(p, 0)


@pytest.mark.parametrize(
    ("p", "hit", "bins", "message"),
    [([1.2], [True], 10, "confidence"), ([], [], 10, "confidence"), ([0.5], [True, False], 10, "right"),
     ([0.5], [2], 10, "right"), ([0.5], [True], 0, "bins")],
)  # fmt: skip
def test_bad_input_of_the_calibration_error(p, hit, bins, message):
    with pytest.raises(ValueError, match=f"^{message}: "):
        expected_calibration_error(p, hit, bins=bins)


# ---- limits are rows, bugs are errors, bad input is said first


def test_what_cannot_be_measured_says_so():
    z = torch.zeros(1, 3)

    def constant(x):
        return z[:1] + 0 * x.sum((1, 2, 3), keepdim=True)[..., 0, 0]

    three = SimpleNamespace(x=TEST.x[:30], y=torch.arange(30) % 3)
    table = trust_report(constant, three, threat=L1(1.0), n=10).table
    silent = table[table.verdict == "not measured"]
    assert {"attacked", "certified", "backdoor", "leakage", "gaps", "explanations"} == set(silent.section)
    assert silent.value.isna().all() and (silent.n == 0).all()
    flat = SimpleNamespace(x=TEST.x.flatten(1), y=TEST.y)
    net = nn.Sequential(nn.Linear(64, 10)).eval()
    found = trust_report(net, flat, n=10)
    assert found["classes flagged"].verdict == found["Square"].verdict == "not measured"
    assert {"accuracy", "calibration", "by class"} == set(found.figures())


def test_a_bug_still_raises(model, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(report.sections, "margins", broken)
    with pytest.raises(ValueError, match="a bug"):
        trust_report(model, TEST, sections=["certified"], n=5)


def test_a_certificate_for_a_broken_image_is_a_bug(model, monkeypatch):
    monkeypatch.setattr(report.sections, "margins", lambda model, x, y, *a, **k: torch.ones(len(x), 10))
    with pytest.raises(RuntimeError, match="both certified and broken"):
        trust_report(model, TEST, sections=["attacked", "certified"], n=20, threat=Linf(0.4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(test=TEST.x), TypeError, "test: "),
        (dict(test=SimpleNamespace(x=TEST.x * 255, y=TEST.y)), ValueError, "test.x: "),
        (dict(test=SimpleNamespace(x=TEST.x, y=TEST.y + 5)), ValueError, "test: got label"),
        (dict(train=SimpleNamespace(x=TEST.x[..., :4], y=TEST.y)), ValueError, "train"),
        (dict(threat=0.1), TypeError, "threat: "),
        (dict(n=1), ValueError, "n: "),
        (dict(n=2.5), TypeError, "n: "),
        (dict(effort=0), ValueError, "effort: "),
        (dict(sections="clean"), ValueError, "sections: "),
        (dict(sections=["luck"]), ValueError, "sections: "),
        (dict(seed=-1), ValueError, "seed: "),
        (dict(name=3), TypeError, "name: "),
        (dict(groups=[0, 1]), ValueError, "group"),
        (dict(model=3), TypeError, "model: "),
    ],
    ids=lambda v: str(v)[:24] if isinstance(v, str) else "",
)  # fmt: skip
def test_bad_input_is_named_before_any_work(model, monkeypatch, change, error, message):
    monkeypatch.setattr(report.call, "SECTIONS", {"work": lambda *a: pytest.fail("work began")})
    given_ = dict(model=model, test=TEST) | change
    with pytest.raises(error, match=f"^{message}"):
        trust_report(given_.pop("model"), given_.pop("test"), **given_)


# ---- the page


class Page(HTMLParser):
    """What is open must be closed, in order; keeps the tags with their attributes."""

    VOID = {"meta", "img", "link", "br", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.wrong = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_can_be_read_aloud(usual, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(report.page, "figures", lambda _: pictures)
    text = usual.html(tmp_path / "page.html", date="1 January 2026")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text and "1 January 2026" in text
    tags = Page(text).tags
    by_name = {}
    for tag, attrs in tags:
        by_name.setdefault(tag, []).append(attrs)
    assert by_name["html"] == [{"lang": "en"}] and len(by_name["h1"]) == len(by_name["title"]) == 1
    assert not {"script", "link", "iframe"} & set(by_name)
    assert all(a["src"].startswith("data:image/") and len(a["alt"]) > 20 for a in by_name["img"])
    assert not any("http" in str(a.get(k, "")) for _, a in tags for k in ("src", "href"))
    assert all(a.get("scope") in ("row", "col") for a in by_name["th"])
    assert len(by_name["caption"]) == len(by_name["table"]) == 8
    assert len(text) < 1e6
    for row in usual.rows:
        assert row.what in text
    for value in ("trust_report(model, &lt;digits", "seed=0", torch.__version__, "SHA-256"):
        assert value in text
    assert len(Page(usual._repr_html_()).tags) > 20


def test_what_a_caller_names_cannot_break_the_page(model, monkeypatch):
    monkeypatch.setattr(report.page, "figures", lambda _: {})
    odd = '<script>alert("1")</script>'
    found = trust_report(
        model, TEST, sections=["gaps"], n=5, name=odd, groups=[odd if i % 2 else "&" for i in range(len(TEST))]
    )
    text = found.html(date="<b>")
    assert "<script" not in text and "<b>" not in text
    Page(text)


def test_figures_are_there_for_what_was_seen(pictures, model):
    assert set(pictures) == {"accuracy", "attacked", "backdoor", "leakage", "calibration", "by class", "by group",
                                    "explanations"}  # fmt: skip
    assert all(len(alt) > 20 for _, alt in pictures.values())
    assert set(trust_report(model, TEST, sections=["leakage"], n=5).figures()) == {"accuracy"}


def test_another_network_has_another_checksum(model, usual):
    other = trust_report(trained(seed=1, epochs=1), TEST, sections=(), n=5)
    assert other.settings["network"] != usual.settings["network"]


def test_rows_are_found_by_their_beginning(usual):
    assert usual["accuracy"].section == "clean"
    for what in ("no such row", "gradient map", ""):
        with pytest.raises(KeyError, match="rows begin so"):
            usual[what]


def test_side_by_side_keeps_every_row(usual, model):
    other = trust_report(model, TEST, sections=["gaps", "leakage"], n=5)
    table = side_by_side({"usual": usual, "other": other})
    assert list(table.columns) == ["usual", "other"] and not table.isna().any(axis=None)
    assert set(table.index) == {(r.section, r.what) for r in (*usual.rows, *other.rows)}
    with pytest.raises(TypeError, match="^reports: "):
        side_by_side([usual])


# ---- the leaderboard


def test_the_board_ranks_and_takes_the_worst_case(model):
    few = TEST[:40]
    field = {"nothing": lambda model, x, y, threat: x, "FGSM": attacks.fgsm, "PGD": attacks.pgd}
    board = leaderboard({"net": model}, few.x, few.y, Linf(0.1), field).set_index("attack")
    assert board.index[-1] == "all together" and board.left[:3].is_monotonic_increasing
    assert board.left["all together"] <= board.left["PGD"] <= board.left["nothing"]
    assert board.left["nothing"] == pytest.approx(training.accuracy(model, few.x, few.y))
    assert (board.low <= board.left).all() and (board.left <= board.high).all()


def test_the_referee_disqualifies_who_leaves_the_ball_and_lets_nobody_move_the_goal(model):
    few, before = TEST[:30], copy.deepcopy(model.state_dict())

    def cheat(model, x, y, threat):
        for p in model.parameters():
            p.data.zero_()
        return x

    field = {"far": lambda model, x, y, threat: 1 - x, "cheat": cheat}
    board = leaderboard({"net": model}, few.x, few.y, Linf(0.1), field).set_index("attack")
    assert board.verdict["far"].startswith("disqualified: attacks: ") and math.isnan(board.left["far"])
    assert board.left["cheat"] == board.left["all together"] == pytest.approx(training.accuracy(model, few.x, few.y))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_bug_of_an_attack_goes_through_and_bad_input_is_named(model):
    def bug(model, x, y, threat):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine"):
        leaderboard({"net": model}, TEST.x[:4], TEST.y[:4], Linf(0.1), {"bug": bug})
    for change in (dict(networks={}), dict(attacks=[attacks.pgd]), dict(attacks={"a": 3})):
        options = dict(networks={"net": model}, attacks={"a": attacks.pgd}) | change
        with pytest.raises(TypeError, match=f"^{next(iter(change))}: "):
            leaderboard(options["networks"], TEST.x[:4], TEST.y[:4], Linf(0.1), options["attacks"])
    assert math.isnan(leaderboard({"n": model}, TEST.x[:4], TEST.y[:4], Linf(0.1),
                                  {"far": lambda m, x, y, t: 1 - x}).left[0])  # fmt: skip
