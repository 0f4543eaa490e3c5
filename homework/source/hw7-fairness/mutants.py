"""Wrong answers: question -> (what is wrong, text of the solution, text in its place, what the check's message says)."""

MUTANTS = {
    "q1-rates": [
        ("of all, not of the harmless", "mean(v[u == 0])", "mean(v * (u == 0))", "FPR of a"),
        ("found instead of missed", "mean(1 - v[u == 1])", "mean(v[u == 1])", "FNR of a"),
        ("the other way round", "mean(u[v == 1])", "mean(v[u == 1])", "of a is"),
        ("the base rate", '"selected": mean(v)', '"selected": mean(u)', "of a is"),
        ("all groups at once", "y[group == a], y_hat[group == a]", "y, y_hat", "of a is"),
        ("zero over nobody", "mean(u[v == 1])", "float(u[v == 1].sum() / max(1, v.sum()))", "want nan"),
    ],
    "q2-identity": [
        ("missed for found", "* (1 - fnr)\n", "* fnr\n", "forced FPR"),
        ("odds upside down", "p / (1 - p)", "(1 - p) / p", "forced FPR"),
        ("precision upside down", "(1 - ppv) / ppv", "ppv / (1 - ppv)", "forced FPR"),
        ("no base rate", "p / (1 - p) * ", "", "forced FPR"),
        ("missed people are right", "p * (1 - fnr), ", "p * fnr, ", "precision"),
        ("one base rate", "(1 - p) * fpr", "p * fpr", "precision"),
        ("odds, not a share", "right / (right + wrong)", "right / wrong", ""),
        ("no base rate in the wrong ones", "(1 - p) * fpr", "fpr", "precision"),
    ],
    "q3-odds": [
        ("TPR left free", "        program += T - T0 == 0\n", "", "TPRs differ"),
        ("FPR left free", "        program += F - F0 == 0\n", "", "FPRs differ"),
        ("weights without a sum", "        program += pulp.lpSum(w[a]) == 1\n", "", "what does the solver say"),
        ("negative weights", '_{t}", 0)', '_{t}")', ""),
        ("costs swapped", "cost[0] * share[a][0] * F + cost[1]", "cost[1] * share[a][0] * F + cost[0]", ""),
        ("shares swapped", "share[a][0] * F + cost[1] * share[a][1]", "share[a][1] * F + cost[1] * share[a][0]", ""),
        ("rewards misses", "(1 - T)", "T", ""),
        ("maximises", 'pulp.LpProblem("odds")', 'pulp.LpProblem("odds", pulp.LpMaximize)', "the least is"),
        ("first two groups only", "in others", "in others[:1]", "differ by"),
    ],
    "q4-lots": [
        ("one lot for a group", "size=mine.sum(), p=w", "p=w", "the weights say"),
        ("ties refused", ">= t", "> t", "the weights say"),
        ("every threshold alike", ", p=w", "", "the weights say"),
        ("chance of its own", "rng.choice", "np.random.default_rng().choice", "the same rng seed"),
        ("always the same chance", "rng.choice", "np.random.default_rng(0).choice", "another rng seed"),
        ("thresholds of one group", "thresholds[a]", "thresholds[min(thresholds)]", "the weights say"),
    ],
}  # fmt: skip
