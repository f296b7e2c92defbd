"""Write `old_run.tar.xz`: a tiny run, its checkpoints and exports, as commit be4ee9a wrote them.

Run it in a checkout of the commit whose formats are to be kept, on CPU:

    PYTHONPATH=$PWD python .../tests/checkpoint/write_old_run.py OUTPUT.tar.xz

The archive holds `run/` (checkpoint 3, metrics of 6 steps), `hf/` (convert --format=hf), `ours/`
(convert --format=llamajax, which that commit still had), and `arrays.json`: the SHA-256 of every
array of checkpoints 3 and 6 as that commit reads them.
"""

import gzip
import hashlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import jax
import numpy as np

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
HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "training" / "tiny_run.py"


def unpack_data(directory: Path) -> Path:
    """Write the stored prepared data (`tests/data/prepared_v1`) as a directory to train on."""
    directory.mkdir()
    for file in (HERE.parent / "data" / "prepared_v1").iterdir():
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        (directory / file.name.removesuffix(".gz")).write_bytes(content)
    return directory


def hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every array of a checkpoint, by name."""
    from llamajax.checkpoint import read_arrays_index, restore_state

    found = restore_state(checkpoint, read_arrays_index(checkpoint))
    return {name: hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for name, x in found.items()}


def main(output: Path) -> None:
    """Train, convert, hash, pack."""
    from llamajax.training.shutdown import Shutdown

    from llamajax import convert
    from llamajax.config import load
    from llamajax.training.run import train

    folder = Path(tempfile.mkdtemp())
    run = folder / "run"
    config = load(f"{CONFIG}:{unpack_data(folder / 'data')}", SETTINGS)
    assert train(config, workdir=run, shutdown=Shutdown()) == 0
    for kind, name in (("hf", "hf"), ("llamajax", "ours")):
        flags = [f"--from={run}", f"--to={folder / name}", f"--format={kind}", "--dtype=float32"]
        assert convert.main(flags) == 0
    steps = {step: hashes(run / "checkpoints" / step) for step in ("3", "6")}
    (folder / "arrays.json").write_text(json.dumps(steps, indent=1))
    with tarfile.open(output, "w:xz") as archive:
        for name in ("run/checkpoints/3", "run/metrics.jsonl", "run/config.json", "run/tokenizer"):
            archive.add(folder / name, name)
        for name in ("hf", "ours", "arrays.json"):
            archive.add(folder / name, name)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main(Path(sys.argv[1]))
