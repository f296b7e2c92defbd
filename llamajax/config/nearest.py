"""The word that was probably meant: for misspelt keys, flags, presets, choices and verbs."""

import difflib
from collections.abc import Iterable


def nearest(word: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The choice most like `word`, or None when none is at least `cutoff` (0 to 1) like it."""
    by_folded = {choice.casefold(): choice for choice in choices}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=cutoff)
    return by_folded[found[0]] if found else None


def nearest_key(path: str, paths: Iterable[str]) -> str | None:
    """The key path most like `path`: the same section first, then the same name in another one."""
    paths = list(paths)
    section, _, name = path.rpartition(".")
    siblings = {p.rpartition(".")[2]: p for p in paths if p.rpartition(".")[0] == section}
    if found := nearest(name, siblings):
        return siblings[found]
    if same := [p for p in paths if p.rpartition(".")[2] == name]:
        return nearest(path, same) or same[0]
    # Paths of one section are alike by their prefix alone, so ask for more.
    return nearest(path, paths, cutoff=0.8)


def did_you_mean(choice: str | None) -> str:
    """A clause that ends a message; empty when there is no choice to offer."""
    return f"; did you mean {choice}?" if choice else ""
