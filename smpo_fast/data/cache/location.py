"""Where a cache is: on this machine, in preparation, or behind a URL."""

from __future__ import annotations

import shutil
from pathlib import Path

from smpo_fast.common import remote, shared_work
from smpo_fast.common.errors import DataError
from smpo_fast.common.remote import RemoteFolder
from smpo_fast.config.schema import Config
from smpo_fast.data.cache.format import INFO, PAIRS, PROMPTS, REJECTED, read_info


def locate(config: Config) -> Path:
    """The folder on this machine of the cache that ``data.cache`` names, which may not exist yet.

    For a cache behind a URL it is ``<run.dir>/cache``, to which the index is fetched here; shards follow when they
    are read.  Raises EnvironmentProblem if the URL cannot be reached.
    """
    named, local = config.data.cache, Path(config.run.dir) / "cache"
    if not remote.is_url(named):
        return Path(named) if named else local
    if not exists(local):
        fetch_index(local, named)
    return local


def exists(root: Path) -> bool:
    """Whether there is a complete cache; its files are not checked."""
    return (root / INFO).is_file()


def partial(root: Path) -> Path:
    """The folder in which a cache is prepared."""
    return root.parent / f".{root.name}.partial"


def publish(root: Path) -> None:
    """Rename a complete cache to its final name, or wait for the process that is doing so."""
    if exists(partial(root)):
        shared_work.publish(partial(root), root, INFO)
    elif exists(root):
        shared_work.remove_locks(root)
        shutil.rmtree(partial(root), ignore_errors=True)  # of a process that started when the cache was complete


def check_target(root: Path) -> None:
    """Raise DataError if something other than a cache is at ``root``."""
    if not exists(root) and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"data.cache: {root} exists and is not a cache: remove it, or give data.cache another folder")


def fetch_index(root: Path, origin: str) -> bool:
    """Fetch the index of a cache behind a URL, without its shards, to ``root``; False if there is no cache."""
    folder = RemoteFolder(origin)
    if folder.size(INFO) is None:
        return False
    folder.fetch([PAIRS, PROMPTS, REJECTED, INFO], root)  # the description last: it marks the cache as complete
    return True


def send(root: Path, origin: str) -> int:
    """Upload a complete cache to a URL, except files that are there already; returns how many were uploaded."""
    files = [name for name in read_info(root).files if (root / name).is_file()]
    return RemoteFolder(origin).send(root, files, INFO)
