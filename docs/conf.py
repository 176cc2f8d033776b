"""Sphinx: the pages are Markdown (MyST), the API reference comes from the docstrings. `make docs` builds it."""

import re
from typing import Any

from fastddpm import __version__

project = "fastddpm"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Exact sampling of denoising diffusion models in PyTorch",
    "page_width": "1160px",
    "body_max_width": "920px",
    "sidebar_width": "230px",
    "font_size": "16px",
    "code_font_size": "0.75em",
    "fixed_sidebar": True,
    "globaltoc_maxdepth": 2,
    "show_powered_by": False,
}
html_sidebars = {"**": ["about.html", "navigation.html", "searchbox.html"]}
html_copy_source = html_show_sourcelink = html_show_copyright = False
myst_heading_anchors = 3  # so that links to headings work as on GitHub
default_role = "code"  # docstrings have `code` in single backticks
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_use_rtype = False
napoleon_use_ivar = True

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields): *(.*)")


def to_google_style(app: Any, kind: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring, in place, into the form that napoleon and reStructuredText want.

    A section whose text begins on the line of its title gets a line for the title, and its text is indented. Indented
    lines outside of a section become a literal block. Elsewhere asterisks, bars and trailing underscores, as in
    [N, *shape] and "beta_", are escaped.
    """
    rewritten: list[str] = []
    deeper = ""  # by how much the next lines of a section are indented
    block = "text"  # or "section", "sentence" or "literal"
    if kind == "property" and lines:  # napoleon would take what is before a colon for the type
        lines[0] = lines[0].replace(": ", ", ", 1)
    for line in lines:
        section = _SECTION.fullmatch(line)
        if section or (line and not line.startswith(" ")):
            block, deeper = ("section" if section else "text"), ""
        elif block == "text" and line.startswith("    ") and not (rewritten and rewritten[-1]):
            block = "literal"
            rewritten += ["::", ""]
        if section and section[2]:
            title, text = section.groups()
            if title in ("Args", "Attributes") and not re.match(r"[\w, .*]+: ", text):  # a sentence about all of them
                block = "sentence"
                rewritten += ["", f"{title}: {_escaped(text)}"]
            else:
                rewritten += ["", f"{title}:", f"    {_escaped(text)}"]
                deeper = "" if title in ("Returns", "Yields") else "    "
        elif section:
            rewritten += ["", line]
        else:
            line = line.strip() if block == "sentence" else line
            rewritten.append(line if block == "literal" else deeper + _escaped(line))
    lines[:] = rewritten


def _escaped(line: str) -> str:
    """The line with the markup of reStructuredText escaped outside of `code`."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else re.sub(r"[*|\\]|_(?!\w)", r"\\\g<0>", part) for part in parts)


def to_plain_path(app: Any, page: str, source: list[str]) -> None:
    """Make links to files outside of docs/ their paths: they work on GitHub, but the site does not have these files."""
    source[0] = re.sub(r"\[([^]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)", _path_of_link, source[0])


def _path_of_link(link: re.Match[str]) -> str:
    text, path = link[1], link[2]
    return f"`{path}`" if text == path else f"{text} (`{path}`)"


def setup(app: Any) -> None:
    app.connect("source-read", to_plain_path)
    app.connect("autodoc-process-docstring", to_google_style, priority=400)  # before napoleon, whose priority is 500
