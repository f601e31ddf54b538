"""The directory of a job of Ray Data, without Ray: what is in it that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from infc.driver.ray.job import row_digest
from infc.driver.ray.store import Store
from infc.ir.errors import UsageError


def test_rows_that_are_there_are_known(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write(pa.table({"id": ["a", "b"]}), "one")
    store.write(pa.table({"id": ["c"]}), "two")
    assert store.done("id").tolist() == sorted(map(row_digest, "abc"))


@pytest.mark.parametrize("is_parquet", [True, False])
def test_a_file_of_something_else_is_named(tmp_path: Path, is_parquet: bool) -> None:
    place = tmp_path / "mine.parquet"
    if is_parquet:
        parquet.write_table(pa.table({"name": ["a"]}), place)
    else:
        place.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"mine\.parquet: cannot be read: ") as caught:
        Store(str(tmp_path)).done("id")
    assert "\n" not in str(caught.value)
