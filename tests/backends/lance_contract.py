"""`HomeContract` for homes in a Lance table: the back door is the library's own methods."""

import lance

from m3backends.lance.home import LanceHome
from m3backends.lance.schema import FILE_FORMAT, as_table, block_row, table_schema
from m3runtime.storage.tier import Tier
from m3runtime.testing.home import HomeContract


class LanceContract(HomeContract):
    several_writers = True

    def raw_read(self, tier: Tier, id: int) -> bytes | None:
        assert isinstance(tier, LanceHome)
        table = lance.dataset(tier._table.location.uri)
        rows = table.to_table(columns=["block_id"], filter=f"block_id = {id}", with_row_id=True)["_rowid"]
        return table.read_blobs("block", ids=rows.to_pylist())[0][1] if len(rows) else None

    def raw_write(self, tier: Tier, id: int, block: bytes) -> None:
        assert isinstance(tier, LanceHome)
        table = lance.dataset(tier._table.location.uri)
        table.delete(f"block_id = {id}")
        dim = tier._table.newest().dim
        lance.write_dataset(
            as_table([block_row(id, block)], dim),
            tier._table.location.uri,
            schema=table_schema(dim),
            mode="append",
            data_storage_version=FILE_FORMAT,
        )
