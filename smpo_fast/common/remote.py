"""Folders in a bucket (``s3://``, ``gs://`` and whatever else fsspec opens): copies of their files on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

from smpo_fast.common.errors import UserError


def is_url(place: str) -> bool:
    """Whether a folder's name is a URL."""
    return "://" in place


class RemoteFolder:
    """A folder named by a URL. Raises SettingsError where it cannot be reached or its package is missing."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._system, self._path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: {error} (s3:// needs the package s3fs, gs:// gcsfs)") from error

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            return int(self._system.info(f"{self._path}/{name}")["size"])
        except FileNotFoundError:
            return None
        except Exception as error:  # each service has errors of its own
            raise self._unreachable(name, error) from error

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Copy files into a folder; each appears there whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            draft = folder / f".{name}.{os.getpid()}.tmp"
            try:
                self._system.get_file(f"{self._path}/{name}", str(draft))
                os.replace(draft, folder / name)
            except Exception as error:
                raise self._unreachable(name, error) from error
            finally:
                draft.unlink(missing_ok=True)

    def send(self, folder: Path, names: Iterable[str]) -> int:
        """Copy those files of a folder that are not there in their size; returns how many were copied."""
        sent = 0
        for name in names:
            if self.size(name) != (folder / name).stat().st_size:
                try:
                    self._system.makedirs(self._path, exist_ok=True)
                    self._system.put_file(str(folder / name), f"{self._path}/{name}")
                except Exception as error:
                    raise self._unreachable(name, error) from error
                sent += 1
        return sent

    def _unreachable(self, name: str, error: Any) -> UserError:
        return UserError(f"{self.url}/{name}: {type(error).__name__}: {error}")
