"""What students and the teacher read afterwards: one plain page a student, one report on the class.

Everything that a student wrote is escaped: a page can be opened without running any of it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.5 }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .5rem .75rem; border-bottom: 1px solid #8886 }
td.points { white-space: nowrap; font-variant-numeric: tabular-nums }
blockquote { margin: 0; white-space: pre-wrap; border-left: .25rem solid #8886; padding-left: 1rem }
"""


def _points(score: float | None, most: float) -> str:
    return f"– / {most:g}" if score is None else f"{score:g} / {most:g}"


def page(file: Path, assignment, result: dict, scores: dict, marks: dict) -> None:
    """The page that a student is given."""
    title = f"{assignment.name}: {result['student']}"
    got, open_ = sum(s for s in scores.values() if s is not None), any(s is None for s in scores.values())
    lines = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>",
             "<meta name='viewport' content='width=device-width, initial-scale=1'>", f"<style>{STYLE}</style>",
             f"<h1>{escape(title)}</h1>", f"<p><strong>{got:g} of {assignment.points:g} points</strong>"
             + (", and what is still marked by hand" if open_ else "") + ".</p>",
             "<table><thead><tr><th>Question<th>Points<th>What the check said</thead><tbody>"]  # fmt: skip
    for question in assignment.questions:
        if question.is_essay:
            said = _essay(assignment, question, result, marks.get(question.name), scores[question.name])
        else:
            outcome = result["checks"].get(question.check, {"passed": False, "message": "not checked"})
            said = "All properties hold." if outcome["passed"] else escape(outcome["message"])
        points = _points(scores[question.name], question.points)
        lines.append(f"<tr><td>{escape(question.name)}<td class='points'>{points}<td>{said}")
    lines.append("</tbody></table>")
    if result["problem"]:
        lines.append(f"<p>The file could not be graded: {escape(result['problem'])}.</p>")
    if result["notes"]:
        lines.append("<h2>What was mended, or happened</h2><ul>")
        lines += [f"<li>{escape(note)}" for note in result["notes"]]
        lines.append("</ul>")
    for question in assignment.essays:
        if text := result["essays"].get(question.name):
            lines.append(f"<h2>Your answer to {escape(question.name)}</h2><blockquote>{escape(text)}</blockquote>")
    lines.append("</html>")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines), encoding="utf-8")


def _essay(assignment, question, result: dict, mark: dict | None, score: float | None) -> str:
    if not result["essays"].get(question.name):
        return "No answer."
    if mark is None or score is None:
        return "Will be marked by hand."
    most = {criterion["criterion"]: criterion["points"] for criterion in assignment.rubric[question.name]}
    each = ", ".join(f"{escape(name)} {points:g}/{most.get(name, 0):g}" for name, points in mark["criteria"].items())
    return each + (f"<br>{escape(mark['comment'])}" if mark["comment"] else "")


def report(assignment, about: dict, results: dict[str, dict], rows: list[dict]) -> str:
    """The teacher's overview, as Markdown."""
    graded = [row for row in rows if row["status"] != "nothing handed in"]
    lines = [
        f"# {assignment.name}: report",
        "",
        f"{len(graded)} submissions, {len(about['absent'])} students without one.",
    ]
    lines += ["", "| question | points | full marks |", "|---|---:|---:|"]
    for question in assignment.questions:
        full = sum(row[question.name] == f"{question.points:g}" for row in graded)
        lines.append(f"| {question.name} | {question.points:g} | {full} of {len(graded)} |")
    for title, pick in (
        ("Could not be read", lambda r: [r["problem"]] if r["problem"] else []),
        ("Look at these: code that replaces a library's function or looks at its grader", lambda r: r["flags"]),
        ("Mended, or happened while it ran", lambda r: r["notes"]),
        ("Failed checks", lambda r: [] if r["problem"] else [
            f"{name}: {outcome['message']}" for name, outcome in r["checks"].items() if not outcome["passed"]]),
    ):  # fmt: skip
        found = {student: pick(result) for student, result in results.items() if pick(result)}
        lines += ["", f"## {title}", ""] + ([] if found else ["Nothing."])
        for student, items in found.items():
            lines += [f"- **{student}** ({results[student]['file']})", *(f"  - {_inline(item)}" for item in items)]
    for title, items in (("Files", about["notes"]), ("Nothing handed in", about["absent"]),
                         ("Graded earlier, not in this download", about["earlier"])):  # fmt: skip
        if items:
            lines += ["", f"## {title}", "", *(f"- {_inline(item)}" for item in items)]
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    return escape(" ".join(text.split()), quote=False)
