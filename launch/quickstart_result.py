"""Print what the quickstart learned: the held-out loss next to that of token frequencies."""

import json
import math
import sys
from pathlib import Path


def main(workdir: Path) -> int:
    """Print the comparison. Return 1 if the model is no better than counting tokens."""
    rows = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [row for row in map(json.loads, rows) if "eval_loss" in row]
    if not evaluations:
        print("no evaluation yet: the run was stopped before its first; rerun to continue")
        return 0
    last = evaluations[-1]
    manifest = json.loads((workdir / "data" / "manifest.json").read_text(encoding="utf-8"))
    unigram = manifest["splits"]["validation"]["unigram_loss"]
    perplexity = math.exp(last["eval_loss"])
    print(
        f"held-out loss after step {last['step']}: {last['eval_loss']:.3f} nats per token", end=""
    )
    print(f" (perplexity {perplexity:.0f})")
    print(f"token frequencies of the book alone: {unigram:.3f} nats per token")
    return 0 if last["eval_loss"] < unigram else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
