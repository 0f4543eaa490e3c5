"""Wrong answers: question -> (what is wrong, text of the solution, text in its place, what the check's message says)."""

MUTANTS = {
    "q1-interval": [
        ("the weights' signs ignored", "plus @ low + minus @ high + b", "W @ low + b", "not sound"),
        ("wrong ends", "plus @ high + minus @ low + b", "plus @ low + minus @ high + b", "not sound"),
        ("absolute weights on both sides", "plus @ low + minus @ high + b",
         "-np.abs(W) @ np.maximum(abs(low), abs(high)) + b", "too wide"),
        ("no ReLU between the layers", "np.maximum(0, l), np.maximum(0, u)", "l, u", "layer 2"),
        ("no bias", "plus @ low + minus @ high + b", "plus @ low + minus @ high", ""),
        ("bounds after the ReLU", "bounds.append((l, u))", "bounds.append((np.maximum(0, l), np.maximum(0, u)))", ""),
        ("forgets the logits", "return bounds", "return bounds[:-1]", "bounds of 2 layers"),
    ],
    "q2-bigm": [
        ("no lower constraint", "    problem += z >= pre\n", "", "z may fall"),
        ("v never switches off", "    problem += z <= u * v\n", "", "z may rise"),
        ("no upper constraint by pre", "    problem += z <= pre - (1 - v) * l\n", "", "z may rise"),
        ("l and u exchanged", "z <= u * v", "z <= -l * v", ""),
        ("v relaxed", 'cat="Binary"', "lowBound=0, upBound=1", "z may rise"),
        ("binaries for known signs", "    if l >= 0:\n        return pre\n", "    u = max(u, 0)\n    l = min(l, 0)\n",
         "binary for a known sign"),
    ],
    "q3-triangle": [
        ("no lower constraint", "    problem += z >= pre\n", "", "z may fall"),
        ("negative values allowed", 'pulp.LpVariable(f"z_{name}", 0)', 'pulp.LpVariable(f"z_{name}")', "z may fall"),
        ("no upper line", "    problem += z <= (pre - l) * (u / (u - l))\n", "    problem += z <= u\n", "z may rise"),
        ("line through the origin", "(pre - l) * (u / (u - l))", "pre * (u / (u - l))", ""),
        ("slope one", "(pre - l) * (u / (u - l))", "pre - l", "z may rise"),
        ("exact instead of relaxed", "    problem += z >= pre\n", "    v = pulp.LpVariable(f\"v_{name}\", cat=\"Binary\")\n"
         "    problem += z >= pre\n    problem += z <= u * v\n    problem += z <= pre - (1 - v) * l\n", ""),
        ("always inactive where unsure", "    if l >= 0:", "    if l < 0 < u:\n        return pulp.lpSum([])\n    if l >= 0:",
         "the chord has"),
    ],
    "q4-verdict": [
        ("stops at the first rival", "        safe = safe and bound > 0\n",
         "        return (\"robust\" if bound > 0 else \"unknown\"), None\n", ""),
        ("believes a relaxation", "if inside and np.delete(z, y).max() >= z[y]", "if bound <= 0", "want 'unknown'"),
        ("does not look whether it is in the ball", "if inside and", "if", "outside the ball"),
        ("no error means robust", "safe = safe and bound > 0", "pass", "want 'unknown'"),
        ("compares the label with itself", "        if j == y:\n            continue\n", "", "want 'robust'"),
        ("robust at a bound of 0", "bound > 0", "bound >= 0", "exactly 0"),
        ("wrong sign", "safe and bound > 0", "safe and bound < 0", "want 'robust'"),
    ],
}  # fmt: skip
