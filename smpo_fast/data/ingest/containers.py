"""The containers that preference data comes in, each read as a stream of records.

parquet, arrow (``save_to_disk`` of Hugging Face's datasets), tar (webdataset), json (an array, or one record a line),
csv, and two layouts of a folder of images. What the columns mean is decided elsewhere (``columns``). A record that
cannot be read is an ``UnreadableRecord`` in its place. Nothing is unpickled.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence

from smpo_fast.common.errors import check_not_exhausted
from smpo_fast.data.ingest.folders import FOLDER_LAYOUTS, read_suffix_layout, read_winner_loser_layout
from smpo_fast.data.ingest.manifests import read_csv, read_json
from smpo_fast.data.ingest.records import DAMAGE_ERRORS, Cells, UnreadableRecord
from smpo_fast.data.ingest.source_folder import SourceFolder
from smpo_fast.data.ingest.tables import count_parquet_rows, read_arrow, read_parquet
from smpo_fast.data.ingest.tar import read_tar

CONTAINERS = ("parquet", "arrow", "tar", "json", "csv", *FOLDER_LAYOUTS)


def count_records(folder: SourceFolder, container: str, file: str) -> int | None:
    """Number of a file's records; None where that is not known without reading them."""
    return count_parquet_rows(folder, file) if container == "parquet" else None


def read_records(
    folder: SourceFolder, container: str, file: str, columns: Sequence[str] | None
) -> Iterator[Cells | UnreadableRecord]:
    """The records of a file in order; ``columns`` avoids reading others where the container allows it.

    Raises EnvironmentProblem where the machine has run out of file descriptors or memory.
    """
    readers: dict[str, Callable[[], Iterator[Cells | UnreadableRecord]]] = {
        "parquet": lambda: read_parquet(folder, file, columns),
        "arrow": lambda: read_arrow(folder, file, columns),
        "tar": lambda: read_tar(folder.fs, file),
        "json": lambda: read_json(folder.fs, file),
        "csv": lambda: read_csv(folder.fs, file),
        "w-l": lambda: read_winner_loser_layout(folder),
        "suffix": lambda: read_suffix_layout(folder),
    }
    try:
        yield from readers[container]()
    except DAMAGE_ERRORS as error:
        check_not_exhausted(error, file)
        yield UnreadableRecord(f"damaged: the rest of {posixpath.basename(file)} cannot be read ({error})")
