"""Sphinx: the API pages, from the docstrings. ``make docs`` writes them to docs-html/."""

from importlib.metadata import version as installed

project, author, release = "sculpt", "the sculpt developers", installed("sculpt")
copyright = "the sculpt developers, MIT licence"
# sphinx-mathjax-offline brings MathJax along, so that the pages read without a network.
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
templates_path = ["_templates"]
exclude_patterns = ["_templates"]
html_theme = "furo"
html_title = f"sculpt {release}"
html_show_sourcelink = False
add_module_names = False
python_maximum_signature_line_length = 100

napoleon_numpy_docstring = False
# What a class inherits from torch, torchgfn or dataclasses is documented there.
autodoc_default_options = {"members": True, "inherited-members": "Module,DiscreteEnv,Env,object", "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
