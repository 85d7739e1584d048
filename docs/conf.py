"""How Sphinx builds the manual: `make docs`, with warnings as errors."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

project = "undimix-plugins"
author = "the undimix-plugins authors"
version = release = metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "undimix-plugins"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_copy_source = False

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

# Public names have to be found. Others, of torch, toolkits, modules, are not linked.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!undimix_).*"),
    (r"py:.*", r"undimix_\w+\.[a-z]\w*\..*"),
]

default_role = "literal"  # docstrings put code in single backquotes
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 60
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Inputs", "References"), ("Attributes", "params_style")]
napoleon_use_rtype = False
napoleon_use_admonition_for_references = False

SECTION = re.compile(
    r"(Args|Returns|Raises|References|Examples|Attributes|Inputs|Yields):$"
)


def set_equations_apart(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Shows what a docstring indents outside of sections, an equation, as it stands."""
    # Napoleon takes what stands before a colon in a property's first line to be its type:
    # it gets an empty comment for that line.
    out = ["..", ""] if what == "property" else []
    in_section = in_block = False
    for line in lines:
        if line and not line.startswith(" "):
            in_section, in_block = bool(SECTION.match(line)), False
        elif line and not in_section and not in_block and not (out and out[-1]):
            out += [".. code-block:: text", "    :class: equation", ""]
            in_block = True
        if in_block:
            out += one_a_line(line)
        else:
            # And likewise what is returned.
            out.append(":returns:" if line == "Returns:" else line)
    lines[:] = out


def one_a_line(line: str) -> list[str]:
    """Puts equations that share a line, a wide space between, below each other."""
    margin, name, equations = re.fullmatch(r"( *)(\w+: +)?(.*)", line).groups("")
    first, *others = re.split(r"(?<=,) {2,}", equations)
    if not any(re.match(r"\w+: ", other) for other in others):
        others = [" " * len(name) + other for other in others]
    return [margin + name + first, *(margin + other for other in others)]


class LinkNames(SphinxPostTransform):
    """Links code that is a public name, or a public class's method, to the reference."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        documented = self.env.domains["py"].objects
        here = self.env.docname.rpartition("/")[2].replace("-", "_")
        targets: dict[str, set[str]] = {}
        for name in documented:
            targets.setdefault(name.partition(".")[2], set()).add(name)
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().removesuffix("()")
            found = targets.get(name, set())
            if len(found) > 1:
                # Of several packages' names, that of the one which the page is about.
                found = found & {f"undimix_{here}.{name}"}
            if found and not self._is_apart(literal):
                (target,) = found
                entry = documented[target]
                link = make_refnode(
                    self.app.builder,
                    self.env.docname,
                    entry.docname,
                    entry.node_id,
                    literal.deepcopy(),
                    target,
                )
                literal.replace_self(link)

    @staticmethod
    def _is_apart(node: nodes.Node) -> bool:
        """Whether it stands in a link or a heading."""
        while node.parent is not None:
            node = node.parent
            if isinstance(
                node,
                nodes.reference
                | addnodes.pending_xref
                | nodes.title
                | addnodes.desc_signature,
            ):
                return True
        return False


def visit_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    equation = tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="equation" tabindex="0">{equation}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect(
        "autodoc-process-docstring", set_equations_apart, priority=400
    )  # before napoleon
    app.add_post_transform(LinkNames)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
