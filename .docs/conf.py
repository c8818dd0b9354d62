"""Sphinx: guides, the notebooks as they ran, and the reference from the docstrings. ``make docs`` writes them to docs-html/."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import gallery  # noqa: E402
from sphinx.util.inspect import signature as signature_of  # noqa: E402
from sphinx.util.inspect import stringify_signature  # noqa: E402

import sculpt  # noqa: E402

project, author, release, language = "sculpt", "the sculpt developers", sculpt.__version__, "en"
copyright = "the sculpt developers, MIT licence"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    # MathJax comes along, so that the pages read without a network.
    "sphinx-mathjax-offline",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
templates_path, exclude_patterns = ["_templates"], ["_templates"]
highlight_language = "python"

html_theme, html_title, html_show_sourcelink = "furo", f"sculpt {release}", False
html_static_path, html_css_files = ["_static"], ["sculpt.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#5b2a86", "color-brand-content": "#5b2a86"},
    "dark_css_variables": {"color-brand-primary": "#c9a6ee", "color-brand-content": "#c9a6ee"},
}

add_module_names, python_maximum_signature_line_length = False, 100
napoleon_numpy_docstring = False
# What a class inherits from torch, torchgfn or dataclasses is documented there.
autodoc_default_options = {"members": True, "inherited-members": "Module,DiscreteEnv,Env,object", "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True


ELSEWHERE = {"tests/bench/README.md": "measured", ".github/CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
"""Files of the repository that are pages of the site."""


def link_names(app, page, content):
    """`sculpt.fit` in the words of a page leads to its place in the reference, and files that are pages here lead to these."""
    if str(app.env.doc2path(page)).endswith(".md"):
        parts = re.split(r"(^```.*?^```)", content[0], flags=re.DOTALL | re.MULTILINE)
        for k in range(0, len(parts), 2):
            parts[k] = re.sub(r"(?<![`\[])`(sculpt\.\w+(?:\.\w+)*)`(?!`)", r"{py:obj}`\1`", parts[k])
            for file, known in ELSEWHERE.items():
                parts[k] = re.sub(rf"\]\((?:\.\./)*{re.escape(file)}\)", f"](/{known}.md)", parts[k])
        content[0] = "".join(parts)


def own_signature(app, what, name, thing, options, signature, returns):
    """A class whose ``__new__`` takes anything is called as its ``__init__`` says."""
    if what == "class" and (signature or "").startswith("(*_"):
        found = signature_of(thing.__init__, bound_method=True)
        return stringify_signature(found, show_return_annotation=False, unqualified_typehints=True), returns
    return None


def setup(app):
    gallery.write_pages(HERE.parent / "notebooks", HERE / "gallery")
    app.connect("source-read", link_names)
    app.connect("autodoc-process-signature", own_signature)
