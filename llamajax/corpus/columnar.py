"""Read rows of Parquet and Arrow files: the strings in a column, or the objects of some columns."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llamajax.corpus.long_text import CHUNK, document_of
from llamajax.errors import UserError

_STRINGS = ("string", "large_string", "string_view", "binary", "large_binary")
_BATCH_ROWS = 1024
# How an Arrow file begins, and how an Arrow stream ends.
_FILE_MARK, _END_OF_STREAM = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"


def text_rows(file: Path, raw: BinaryIO, stream: Any, text_key: str) -> Iterator[Any]:
    """Yield the text in each row of a column; a UserError for a row without one.

    stream: the decompressed content of `raw`. Raises UserError for a damaged file, or one without
    the column.
    """
    import pyarrow as pa

    row = 0
    with _opened(file, raw, stream) as (schema, batches):
        if text_key not in schema.names:
            raise UserError(
                f"{file}: no column {text_key!r} (it has {', '.join(schema.names)}); name the "
                "right one with --text_key"
            )
        if schema.names.count(text_key) > 1:
            raise UserError(f"{file}: two columns are named {text_key!r}; drop one of them")
        kind = schema.field(text_key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(kind) not in _STRINGS:
            raise UserError(f"{file}: column {text_key!r} holds {kind}, not strings")
        for batch in batches([text_key]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            column = column.cast(pa.large_binary())  # files promise UTF-8 and check nothing
            for value in column:
                row += 1
                place = f"{file}: row {row}: {text_key!r}"
                try:
                    if not value.is_valid:
                        raise UserError(f"{place} is null, not a string")
                    yield document_of(_chunks(value.as_py(), place))
                except UserError as error:
                    yield error


def object_rows(
    file: Path, raw: BinaryIO, stream: Any, keys: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Yield the place and object of each row, of the columns among `keys`.

    Leaves out nulls: a column has one wherever other rows have a key. A UserError stands for a row
    that cannot be read. Raises UserError for a damaged file, or one without such a column.
    """
    row = 0
    with _opened(file, raw, stream) as (schema, batches):
        columns = [name for name in schema.names if name in keys]
        if not columns:
            has = ", ".join(schema.names)
            raise UserError(f"{file}: no column of an example (it has {has})")
        for batch in batches(columns):
            for number in range(batch.num_rows):
                row += 1
                place = f"{file}: row {row}"
                try:
                    (value,) = batch.slice(number, 1).to_pylist()
                    yield place, _without_nulls(value)
                except UnicodeDecodeError as error:
                    yield place, UserError(f"{place}: not UTF-8 ({error.reason})")


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


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys whose value is null, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _chunks(value: bytes, where: str) -> Iterator[str]:
    start = 0
    while start < len(value):
        end = start + CHUNK
        while end < len(value) and value[end] & 0xC0 == 0x80:
            end += 1
        try:
            yield value[start:end].decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where} is not UTF-8 ({error.reason} at byte {start + error.start}); convert the "
                "column"
            ) from error
        start = end
