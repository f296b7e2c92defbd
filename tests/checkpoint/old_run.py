"""A tiny run, its checkpoints and exports, as commit be4ee9a wrote them: `old_run.tar.xz`.

The archive holds `run/` (checkpoint 3, metrics of 6 steps), `hf/` (convert --format=hf), `ours/`
(convert --format=llamajax, which that commit still had), and `arrays.json`: the SHA-256 of every
array of checkpoints 3 and 6 as that commit reads them. It trained SETTINGS on the stored prepared
data, on 8 CPU devices.
"""

import gzip
from pathlib import Path

# Keys of the run; the test that resumes it has the same ones.
SETTINGS = {
    "model.vocab_size": 258,
    "model.hidden_size": 8,
    "model.intermediate_size": 12,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_size": 4,
    "data.seq_len": 16,
    "mesh.data": 4,
    "mesh.fsdp": 2,
    "train.steps": 6,
    "train.eval_every": 0,
    "checkpoint.every_steps": 3,
    "checkpoint.keep": 5,
    "monitoring.progress": "none",
}
STORED = Path(__file__).parents[1] / "data" / "prepared_v1"


def unpack_data(directory: Path) -> Path:
    """Write the stored prepared data (`tests/data/prepared_v1`) as a directory to train on."""
    directory.mkdir()
    for file in STORED.iterdir():
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        (directory / file.name.removesuffix(".gz")).write_bytes(content)
    return directory
