"""Split WikiText's `.tokens` and `.raw` format into articles, and undo its tokenization marks.

A line is a paragraph or a heading, its words separated by spaces: ` = Title = ` starts an article,
` = = Section = = ` does not. The marks `@-@`, `@,@`, `@.@` join the words beside them.
"""

import re
from collections.abc import Iterable, Iterator

# Only one `=` on either side: ` = = Section = = ` belongs to the article.
_TITLE = re.compile(r"\s*= (?!=)(?:.*[^=\s] )?=\s*")
_HEADING = re.compile(r"(?:= )+[^=](?:.* )?=(?: =)*")


def lines_of(rows: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a data set whose rows are lines (blank ones are empty) or articles."""
    for row in rows:
        lines = row.removesuffix("\n").split("\n")
        if len(lines) > 1:  # an article of its own; its title starts it
            yield "\n"
        yield from (f"{line}\n" for line in lines)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Yield articles, unchanged, from title to title; the text before the first title is one too.

    A title follows a blank line or starts the file: ` = 4 = ` within a paragraph's block is none.
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
    """Restore an article as it was typed, as far as possible. `<unk>` stays: its text is unknown.

    Undoes marks, removes spaces that only separate tokens, leaves one blank line between blocks.
    """
    blocks: list[list[str]] = [[]]
    for line in article.splitlines():
        text = line.strip()
        if text:
            blocks[-1].append(_heading(text) if _HEADING.fullmatch(text) else _paragraph(text))
        elif blocks[-1]:
            blocks.append([])
    return "\n\n".join("\n".join(b) for b in blocks if b) + "\n"


def _heading(text: str) -> str:
    """Rewrite `= = Early life = =` as `== Early life ==`."""
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
    """Join lone quotation marks to the text between them: the first opens, the next closes.

    An odd one at the end stays.
    """
    parts = re.split(rf"(?:(?<=[\s(\[{{\"'])|^){mark}(?=[\s,.;:!?)\]}}\"']|$)", text)
    for i in range(1, len(parts) - (len(parts) % 2 == 0), 2):
        parts[i] = f"{mark}{parts[i].strip(' ')}{mark}"
    if len(parts) % 2 == 0:
        parts[-1] = mark + parts[-1]
    return "".join(parts)
