"""Tables: columns by name, and the parquet files that they are kept in."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sculpt.files import replace_file

__all__ = ["Table", "needs", "write_parquet"]

Table = dict[str, Any]
"""Columns by name, as arrays."""


def needs(module: str, what: str, otherwise: str = "") -> Any:
    """An optional dependency, or an error that says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        why = f"pip install {module}, or pip install 'compositional-sculpting[tables]'."
    except ImportError as error:  # it is there, and does not go with the others
        why = f"the one that is installed does not work ({error})."
    raise ImportError(f"{what} needs {module}: {why} {otherwise}".strip())


def write_parquet(path: Path, table: Table, about: Mapping[str, Any]) -> None:
    """Write a table with a description in its metadata, all of it or nothing."""
    pyarrow = needs("pyarrow", "a .parquet file")
    parquet = needs("pyarrow.parquet", "a .parquet file")
    columns = pyarrow.table({name: pyarrow.array(values, from_pandas=False) for name, values in table.items()})
    buffer = io.BytesIO()
    parquet.write_table(columns.replace_schema_metadata({"sculpt": json.dumps(about)}), buffer)
    replace_file(path, buffer.getvalue())
