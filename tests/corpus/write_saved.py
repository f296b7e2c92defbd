"""Write `saved/` with the library `datasets` (5.2): python tests/corpus/write_saved.py."""

from pathlib import Path

from datasets import Dataset, DatasetDict

HERE = Path(__file__).parent


def rows(first: int, count: int) -> Dataset:
    """Rows with a text, and with a chat in two layouts, of which every third has a system turn."""
    return Dataset.from_list([
        {
            "text": f"Document {n} of the whale.",
            "messages": [{"role": "system", "content": "Be brief."}] * (n % 3 == 0)
            + [{"role": "user", "content": f"Who {n}?"}, {"role": "assistant", "content": "Ahab."}],
            "tools": None,
        }
        for n in range(first, first + count)
    ])  # fmt: skip


if __name__ == "__main__":
    parts = {"train": rows(0, 6), "validation": rows(6, 3), "test": rows(9, 2)}
    shards = {"train": 2, "validation": 1, "test": 1}
    DatasetDict(parts).save_to_disk(HERE / "saved", num_shards=shards)
