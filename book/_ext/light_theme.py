"""A light theme: of the two thousand icons that it brings, as a script and as fonts, the dozen that the pages use.

Each becomes a rule of the style sheet: the theme's own outline, as a mask over the colour of the text around it.
"""

import re
from pathlib import Path
from urllib.parse import quote

import pydata_sphinx_theme
from sphinx.errors import ExtensionError

THEME = (
    Path(pydata_sphinx_theme.__file__).parent
    / "theme"
    / "pydata_sphinx_theme"
    / "static"
)
SCRIPT, SHEET = "scripts/fontawesome.js", "styles/pydata-sphinx-theme.css"
FAMILY = re.compile(r"\b(?:fa-solid|fas|fa-brands|fab)\b")
NO_ICON = {"fa-solid", "fa-brands", "fa-lg"}
RULES = """
:is(.fa-solid, .fas, .fa-brands, .fab)::before {
  background-color: currentColor; content: ""; display: inline-block; forced-color-adjust: none;
  height: 1em; width: 1.1em; vertical-align: -0.125em;
  -webkit-mask: var(--course-icon) center / contain no-repeat; mask: var(--course-icon) center / contain no-repeat;
}
.search-button-field > i { display: flex !important; }
"""


def used(text):
    """The icons that a page or a script names, as the text of their classes."""
    classes = re.findall(r'class(?:List)?="([^"]*)"', text)
    return {" ".join(names.split()) for names in classes if FAMILY.search(names)}


def outline(script, classes):
    """(name, SVG) of the icon; brands stand first in the theme's script, solid icons last."""
    (name,) = (
        word
        for word in classes.split()
        if word.startswith("fa-") and word not in NO_ICON
    )
    numbers, rest = r"(\d+),(\d+),", r',"\w+","([^"]+)"\]'
    own, other = (
        rf'[{{,]"?{name[3:]}"?:\[{numbers}\[[^\]]*\]',
        rf'\[{numbers}\[[^\]]*"{name[3:]}"[^\]]*\]',
    )
    drawn = re.findall(own + rest, script) or re.findall(other + rest, script)
    if not drawn:
        raise ExtensionError(f"the theme has no icon {name}")
    width, height, path = (
        drawn[0] if "fab" in classes or "fa-brands" in classes else drawn[-1]
    )
    return (
        name,
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><path d="{path}"/></svg>',
    )


def keep_the_icons_in_use(app, exception):
    if exception is not None or app.builder.name != "html":
        return
    static = Path(app.outdir) / "_static"
    texts = [
        *Path(app.outdir).rglob("*.html"),
        static / "scripts" / "pydata-sphinx-theme.js",
    ]
    classes = set().union(*(used(path.read_text(encoding="utf-8")) for path in texts))
    script = (THEME / SCRIPT).read_text(encoding="utf-8")
    icons = dict(outline(script, names) for names in sorted(classes))
    sheet = (THEME / SHEET).read_text(encoding="utf-8")
    sheet = re.sub(r"@font-face\{[^}]*Font Awesome[^}]*\}", "", sheet)
    sheet = re.sub(r"(?:\.fa-[\w-]+::?before,?)+\{content:[^}]*\}", "", sheet)
    rules = "".join(
        f".{name} {{ --course-icon: url('data:image/svg+xml,{quote(svg)}'); }}\n"
        for name, svg in icons.items()
    )
    licence = "/* Icons: Font Awesome Free, fontawesome.com, CC BY 4.0 */\n"
    (static / SHEET).write_text(f"{sheet}\n{licence}{RULES}{rules}", encoding="utf-8")
    (static / SCRIPT).write_text(
        "/* The icons are in the style sheet. */\n", encoding="utf-8"
    )


def setup(app):
    # After the theme has copied its files.
    app.connect("build-finished", keep_the_icons_in_use, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
