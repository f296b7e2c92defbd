"""The frame of the pages that are written: the report, an inspection, the doctor's."""

import html
import re
from pathlib import Path

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{head}<title>{title}</title>
<style>
{style}
</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def html_page(title: str, body: str, *, style: str = "", head: str = "") -> str:
    """Return a page that needs nothing else. title: as text; body, head: as HTML.

    style: rules added to the report's.
    """
    parts = {"title": html.escape(title), "style": read_part("page.css") + style}
    parts |= {"body": body, "head": head}
    return re.sub(r"\{(title|style|body|head)\}", lambda found: parts[found[1]], _PAGE)


def read_part(name: str) -> str:
    """Return a file of this package: style or script of pages."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
