"""Make the README fit for a package index, where the files that it links and shows do not exist.

All else is in pyproject.toml.
"""

import re
from pathlib import Path


def without_local_links(text: str) -> str:
    """Return Markdown whose links to files are plain text, and without its pictures from files."""
    elsewhere = r"(?!https?://|#)[^)\s]+"
    text = re.sub(rf"!\[[^\]]*\]\({elsewhere}\)\n*", "", text)
    return re.sub(rf"\[([^\]]*)\]\({elsewhere}\)", r"\1", text)


if __name__ == "__main__":
    from setuptools import setup

    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(
        long_description=without_local_links(readme),
        long_description_content_type="text/markdown",
    )
