"""WikiText's `.tokens` and `.raw` format: its articles, and how its tokenisation marks are undone.

A line is a paragraph or a heading, its words separated by spaces: ` = Title = ` starts an article,
` = = Section = = ` stays inside. Marks: `@-@`, `@,@`, `@.@` join what they stand between.
"""

import re
from collections.abc import Iterable, Iterator

# Only one `=` on either side: ` = = Section = = ` belongs to the article.
_TITLE = re.compile(r"\s*= (?!=)(?:.*[^=\s] )?=\s*")
_HEADING = re.compile(r"(?:= )+[^=](?:.* )?=(?: =)*")


def lines_of(rows: Iterable[str]) -> Iterator[str]:
    """The lines of a data set whose rows are lines (blank ones as empty strings) or articles."""
    for row in rows:
        lines = row.removesuffix("\n").split("\n")
        if len(lines) > 1:  # an article of its own; its title starts it
            yield "\n"
        yield from (f"{line}\n" for line in lines)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Articles as they stand, from title to title; what precedes the first is one of its own.

    A title follows a blank line or starts the file: ` = 4 = ` inside a paragraph's block is none.
    """
    article: list[str] = []
    after_blank = True
    for line in lines:
        if after_blank and _TITLE.fullmatch(line):
            if article:
                yield "".join(article)
            article = []
        article.append(line)
        after_blank = line.isspace()
    if article:
        yield "".join(article)


def clean(article: str) -> str:
    """The article as it was typed, as far as that can be known: marks undone, spaces that only
    separated tokens removed, blocks parted by one blank line; `<unk>` stays, it has no text."""
    blocks: list[list[str]] = [[]]
    for line in article.splitlines():
        text = line.strip()
        if text:
            blocks[-1].append(_heading(text) if _HEADING.fullmatch(text) else _paragraph(text))
        elif blocks[-1]:
            blocks.append([])
    return "\n\n".join("\n".join(b) for b in blocks if b) + "\n"


def _heading(text: str) -> str:
    """`= = Early life = =` as `== Early life ==`."""
    words = text.split(" ")
    level = next(i for i, w in enumerate(words) if w != "=")
    return f"{'=' * level} {_paragraph(' '.join(words[level:-level]))} {'=' * level}"


_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" @([-,.])@ ", r"\1"),
        (r" ([,.;:!?%)\]}]|\.\.\.)(?= |$)", r"\1"),
        (r"([(\[{]) ", r"\1"),
        (r"([$£€#]) (?=\d)", r"\1"),
        (r" (n't|'(?:s|S|d|m|ll|re|ve|t))(?= |$|[,.;:!?)\]])", r"\1"),
        (r"(?<=s) '(?= )(?![^']* '(?: |$))", "'"),
    )
]


def _paragraph(text: str) -> str:
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return _join_quotes(_join_quotes(text, '"'), "'")


def _join_quotes(text: str, mark: str) -> str:
    """Quotation marks that stand alone joined to what they enclose: the first opens, the next
    closes; an odd one at the end stays as it is."""
    parts = re.split(rf"(?:(?<=[\s(\[{{\"'])|^){mark}(?=[\s,.;:!?)\]}}\"']|$)", text)
    for i in range(1, len(parts) - (len(parts) % 2 == 0), 2):
        parts[i] = f"{mark}{parts[i].strip(' ')}{mark}"
    if len(parts) % 2 == 0:
        parts[-1] = mark + parts[-1]
    return "".join(parts)
