"""Read rows of Parquet and Arrow files: the strings in a column, or the objects of some columns."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llamajax.corpus.long_text import CHUNK, LongText, document_of
from llamajax.errors import UserError

_STRINGS = ("string", "large_string", "string_view", "binary", "large_binary")
_BATCH_ROWS = 1024
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class ColumnarFile:
    """An open Parquet file, or an Arrow stream or file, whose rows are read once.

    stream: the decompressed content of `raw`. Raises UserError for a damaged file.
    """

    def __init__(self, file: Path, raw: BinaryIO, stream: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        self._file = file
        is_plain = file.name.lower().endswith((".parquet", ".arrow"))
        self._source = raw if is_plain else pa.BufferReader(stream.read())
        self._is_parquet = ".parquet" in file.suffixes[-2:]
        try:
            if self._is_parquet:
                self._table = pa.parquet.ParquetFile(self._source)
                self._schema = self._table.schema_arrow
            else:
                self._batches = self._arrow_batches()
                self._schema = next(self._batches)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def texts(self, text_key: str) -> Iterator[Any]:
        """Yield the text in each row of a column; a UserError for a row without one.

        Raises UserError for a file without the column.
        """
        import pyarrow as pa

        file, names = self._file, self._schema.names
        if text_key not in names:
            raise UserError(
                f"{file}: no column {text_key!r} (it has {', '.join(names)}); name the right one "
                "with --text_key"
            )
        if names.count(text_key) > 1:
            raise UserError(f"{file}: two columns are named {text_key!r}; drop one of them")
        kind = self._schema.field(text_key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(kind) not in _STRINGS:
            raise UserError(f"{file}: column {text_key!r} holds {kind}, not strings")
        row = 0
        for batch in self._read([text_key]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            column = column.cast(pa.large_binary())  # files promise UTF-8 and check nothing
            for value in column:
                row += 1
                yield _text_of(value.as_py(), f"{file}: row {row}: {text_key!r}")

    def objects(self, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Yield the place and object of each row, of the columns among `keys`.

        Nulls are left out, since a column has one wherever other rows have a key. A UserError
        stands for a row that cannot be read. Raises UserError for a file without such a column.
        """
        columns = [name for name in self._schema.names if name in keys]
        if not columns:
            has = ", ".join(self._schema.names)
            raise UserError(f"{self._file}: no column of an example (it has {has})")
        row = 0
        for batch in self._read(columns):
            for number in range(batch.num_rows):
                row += 1
                place = f"{self._file}: row {row}"
                try:
                    (value,) = batch.slice(number, 1).to_pylist()
                    yield place, _without_nulls(value)
                except UnicodeDecodeError as error:
                    yield place, UserError(f"{place}: not UTF-8 ({error.reason})")

    def _read(self, columns: list[str]) -> Iterator[Any]:
        """Yield record batches of some columns."""
        import pyarrow as pa

        try:
            if self._is_parquet:
                yield from self._table.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
            else:
                yield from (batch.select(columns) for batch in self._batches)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def _arrow_batches(self) -> Iterator[Any]:
        """Yield the schema, then the record batches, of an Arrow stream or file."""
        import pyarrow as pa

        source = self._source
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            yield reader.schema
            yield from map(reader.get_batch, range(reader.num_record_batches))
            return
        reader = pa.ipc.open_stream(source)
        yield reader.schema
        yield from reader
        # Arrow takes a file that was cut off between two batches for a whole one.
        source.seek(-len(_END_OF_STREAM), 2)
        if source.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
            raise pa.ArrowInvalid("it has no end mark")

    def _damaged(self, error: Exception) -> UserError:
        kind = "Parquet" if self._is_parquet else "Arrow"
        return UserError(f"{self._file}: truncated or damaged {kind}: {str(error)[:200]}")


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys whose value is null, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text_of(value: bytes | None, where: str) -> str | LongText | UserError:
    if value is None:
        return UserError(f"{where} is null, not a string")
    try:
        return document_of(_chunks(value, where))
    except UserError as error:
        return error


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
