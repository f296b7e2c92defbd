"""Read the strings in a column of a Parquet file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llamajax.corpus.long_text import CHUNK, LongText, document_of
from llamajax.errors import UserError

_STRINGS = ("string", "large_string", "string_view", "binary", "large_binary")


def parquet_rows(file: Path, raw: BinaryIO, stream: Any, text_key: str) -> Iterator[Any]:
    """Yield the text in each row; a UserError for a row without one.

    stream: the decompressed content of `raw`. Raises UserError for a damaged file, or one without
    the column.
    """
    import pyarrow as pa
    import pyarrow.parquet

    plain = file.name.lower().endswith(".parquet")
    try:
        table = pa.parquet.ParquetFile(raw if plain else pa.BufferReader(stream.read()))
        names = table.schema_arrow.names
        if text_key not in names:
            raise UserError(
                f"{file}: no column {text_key!r} (it has {', '.join(names)}); name the right one "
                "with --text_key"
            )
        if names.count(text_key) > 1:
            raise UserError(f"{file}: two columns are named {text_key!r}; drop one of them")
        kind = table.schema_arrow.field(text_key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(kind) not in _STRINGS:
            raise UserError(f"{file}: column {text_key!r} holds {kind}, not strings")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            column = column.cast(pa.large_binary())  # Parquet promises UTF-8 and checks nothing
            for value in column:
                row += 1
                yield _text_of(value.as_py(), f"{file}: row {row}: {text_key!r}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: truncated or damaged Parquet: {str(error)[:200]}") from error


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
