"""Wrong answers: question -> (what is wrong, text of the solution, text in its place, what the check's message says)."""

MUTANTS = {
    "q2-friendly": [
        ("wrong sign", "+ alpha * g.sign()", "- alpha * g.sign()", "wrong direction"),
        ("no projection", "torch.minimum(torch.maximum(new, x - eps), x + eps)", "new", "leaves the eps-ball"),
        ("no clamp", "x + eps).clamp(0, 1)", "x + eps)", "pixels from"),
        ("never stops", "torch.where(go.view(-1, *[1] * (x.dim() - 1)), new, x_adv.detach())", "new", "still moved"),
        ("stops one step late", "(counter > 0)", "(counter >= 0)", "still moved"),
        ("counts all steps", "counter - wrong.long()", "counter - 1", "stop too early or too late"),
        ("the counter never falls", "counter = counter - wrong.long()", "pass", "stop too early or too late"),
        ("one step too few", "range(steps)", "range(steps - 1)", "not plain PGD of"),
        ("wrong norm", "g.sign()", "g / g.norm()", "not plain PGD of"),
        ("stops what is read right", "~wrong |", "wrong |", "still moved"),
        ("ball around the start", "torch.maximum(new, x - eps), x + eps)", "torch.maximum(new, start - eps), start + eps)",
         "leaves the eps-ball"),
    ],
    "q3-robust": [
        ("the clean image is not asked", "right = model(x).argmax(1) == y", "right = torch.ones_like(y).bool()",
         "no attack"),
        ("the last attack only", "right = right & (model(attack", "right = (model(attack", "of 8 images"),
        ("any instead of all", "right = right & (", "right = right | (", "of 8 images"),
        ("counts errors", "argmax(1) == y)", "argmax(1) != y)", "of 8 images"),
        ("among those read right", "right.double().mean()", "right.sum() / (model(x).argmax(1) == y).sum()", "of 8 images"),
    ],
}  # fmt: skip
