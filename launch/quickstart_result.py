"""Prints what the quickstart learnt: held-out loss beside the unigram entropy of the book."""

import json
import math
import sys
from pathlib import Path


def main(workdir: Path) -> int:
    """Print the comparison; 1 when the model is no better than counting words."""
    rows = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [row for row in map(json.loads, rows) if "eval_loss" in row]
    if not evaluations:
        print("no evaluation yet: the run was stopped before its first; rerun to continue")
        return 0
    last = evaluations[-1]
    manifest = json.loads((workdir / "data" / "manifest.json").read_text(encoding="utf-8"))
    unigram = manifest["splits"]["validation"]["unigram_loss"]
    book = manifest["splits"]["train"]["unigram_entropy"]
    print(f"held-out loss after step {last['step']}: {last['eval_loss']:.3f} nats a token")
    print(f"  (perplexity {math.exp(last['eval_loss']):.0f})")
    print(
        f"unigram entropy of the book:       {book:.3f} nats a token; on the held-out text, knowing"
    )
    print(f"  only how often each token occurs in the book costs {unigram:.3f}")
    return 0 if last["eval_loss"] < min(unigram, book) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
