"""The flags of `prepare --inspect`, checked before anything is read."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from llamajax.config import Flags, key
from llamajax.config.forms import check_output

PAGE = "inspect.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions(Flags):
    """Flags that inspect a prepared directory; no others of `prepare` go with them."""

    inspect: str = key(
        "directory to look into: documents, copies, order, overlap of train with validation",
        metavar="DIR",
        is_path=True,
    )
    seq_len: int = key("tokens of a sample", metavar="T", default=4096, at_least=1)
    against: tuple[str, ...] = key(
        "texts to look for in train: .txt, or .jsonl of which every string counts",
        metavar="FILE[,FILE]",
        default=(),
        is_path=True,
    )
    max_tokens: int | None = key(
        "read about so many of a split, an even sample; none: all",
        metavar="N",
        default=1 << 27,
        at_least=1,
    )
    at: int | None = key(
        "show only the document that holds this token of train, as `replay` names it",
        metavar="TOKEN",
        default=None,
        at_least=0,
    )
    html: str | None = key(
        f"where to write the page; none: {PAGE} in DIR",
        metavar="OUT",
        default=None,
        is_path=True,
        check=check_output,
    )
    json: str | None = key(
        "also write all figures as a JSON object",
        metavar="OUT",
        default=None,
        is_path=True,
        check=check_output,
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        others = {f.name: f.default for f in dataclasses.fields(self)}
        del others["inspect"], others["at"], others["seq_len"]
        useless = [f"--{name}" for name in others if getattr(self, name) != others[name]]
        if self.at is not None and useless:
            yield f"--at has no use for {', '.join(useless)}: it shows one document alone"

    @property
    def directory(self) -> Path:
        """The prepared directory."""
        return Path(self.inspect)

    @property
    def page(self) -> Path:
        """Where the page is written."""
        return Path(self.html) if self.html else self.directory / PAGE
