"""Read rows of Parquet and Arrow files as objects of some columns."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llamajax.errors import UserError

_BATCH_ROWS = 1024
# How an Arrow file begins, and how an Arrow stream ends.
_FILE_MARK, _END_OF_STREAM = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"


def object_rows(
    file: Path, raw: BinaryIO, stream: Any, keys: Sequence[str], *, wanted: str
) -> Iterator[tuple[str, Any]]:
    """Yield the place and object of each row, of the columns among `keys`.

    A UserError stands for a row that is not UTF-8, which files promise and nobody checks.

    stream: the decompressed content of `raw`. wanted: words for such a column. Raises UserError
    for a damaged file, or one without any.
    """
    row = 0
    with _opened(file, raw, stream) as (schema, batches):
        columns = [name for name in schema.names if name in keys]
        if not columns:
            has = ", ".join(schema.names)
            raise UserError(f"{file}: has the columns {has}, but no {wanted}")
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise UserError(f"{file}: two columns are named {twice[0]!r}; drop one of them")
        for batch in batches(columns):
            for number in range(batch.num_rows):
                row += 1
                place = f"{file}: row {row}"
                try:
                    (value,) = batch.slice(number, 1).to_pylist()
                    for name in columns:
                        if isinstance(value[name], bytes):
                            value[name] = value[name].decode()
                except UnicodeDecodeError as error:
                    value = UserError(f"{place}: not UTF-8 ({error.reason}); convert the column")
                yield place, value


@contextlib.contextmanager
def _opened(
    file: Path, raw: BinaryIO, stream: Any
) -> Iterator[tuple[Any, Callable[[list[str]], Iterable[Any]]]]:
    """Yield the schema, and what returns the record batches of some columns, in order, once.

    Raises UserError for a file that is damaged, which may be seen when all batches were read.
    """
    import pyarrow as pa
    import pyarrow.parquet

    kind = "Parquet" if ".parquet" in file.name.lower() else "Arrow"
    is_plain = file.name.lower().endswith((".parquet", ".arrow"))
    try:
        source = raw if is_plain else pa.BufferReader(stream.read())
        if kind == "Parquet":
            table = pa.parquet.ParquetFile(source)
            yield table.schema_arrow, lambda names: table.iter_batches(_BATCH_ROWS, columns=names)
            return
        is_stream = source.read(len(_FILE_MARK)) != _FILE_MARK
        source.seek(0)
        reader = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(source)
        batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        yield reader.schema, lambda names: (batch.select(names) for batch in batches)
        if is_stream:  # Arrow takes one that was cut off between two batches for a whole one
            source.seek(-len(_END_OF_STREAM), 2)
            if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
                raise pa.ArrowInvalid("it has no end mark")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: truncated or damaged {kind}: {str(error)[:200]}") from error
