"""A page without a script, in the style of the report."""

import html
import re
from importlib import resources

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def static_page(title: str, body: str, *, style: str = "") -> str:
    """Return the page. title: as text; body: as HTML; style: rules added to the report's."""
    sheet = resources.files(__package__).joinpath("page.css").read_text("utf-8")
    parts = {"title": html.escape(title), "style": sheet + style, "body": body}
    return re.sub(r"\{(title|style|body)\}", lambda found: parts[found[1]], _PAGE)
