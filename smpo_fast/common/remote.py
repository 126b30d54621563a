"""Files on other machines: repositories of the Hugging Face hub, and folders behind a URL that fsspec opens.

What is fetched is copied to this machine; nothing in it is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

from smpo_fast.common.errors import EnvironmentProblem, UserError


def is_url(location: str) -> bool:
    """Whether a location is a URL."""
    return "://" in location


def is_hub_id(location: str) -> bool:
    """Whether a location has the form of a hub repository, ``owner/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", location) is not None


def fetch_repository(
    name: str, *, revision: str = "", kind: str = "model", only: Sequence[str] = (), never: Sequence[str] = ()
) -> Path:
    """Download a snapshot of a hub repository; returns its folder.

    kind: 'model' or 'dataset'.  only, never: file patterns to fetch and to leave out.  Raises EnvironmentProblem with
    the hub's answer if it cannot be fetched.
    """
    try:
        return Path(snapshot_download(
            name, repo_type=kind, revision=revision or None, allow_patterns=list(only), ignore_patterns=list(never)
        ))  # fmt: skip
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentProblem(f"'{name}' is not a local folder, and the hub answered: {error}") from error


def fetch_file(repository: str, names: Sequence[str]) -> Path:
    """Download the first of the files ``names`` that a hub repository has; returns its path.

    Raises EnvironmentProblem with the hub's answers if it has none of them.
    """
    errors = []
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            errors.append(f"{name}: {error}")
    raise EnvironmentProblem(f"'{repository}' is not a local folder, and the hub answered: {'; '.join(errors)}")


def upload(repository: str, files: Mapping[str, Path], *, message: str, private: bool) -> str:
    """Upload files, by their names there, to a model repository of the hub in one commit; returns its address.

    private: whether the repository, if there is none yet, is visible to its owner only. Files that are there and not
    given stay. Raises EnvironmentProblem with the hub's answer if it refuses, or cannot be reached.
    """
    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        added = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        hub.create_commit(repository, added, commit_message=message)
    except (HTTPError, HFValidationError, OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"'{repository}' could not be written to the hub: {error}\n  (log in with 'hf auth login', or set HF_TOKEN "
            "to a token that may write there; nothing is visible there until all files are)"
        ) from error
    return str(address)


class RemoteFolder:
    """A folder behind a URL. Raises EnvironmentProblem if it cannot be reached or its fsspec package is missing."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._system, self._path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise EnvironmentProblem(f"{url}: {error} (s3:// needs the package s3fs, gs:// gcsfs)") from error

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if there is no such file."""
        try:
            return int(self._system.info(f"{self._path}/{name}")["size"])
        except FileNotFoundError:
            return None
        except Exception as error:  # each service has its own exceptions
            raise self._unreachable(name, error) from error

    def fetch(
        self, names: Iterable[str], folder: Path, *, accept: Callable[[str, Path], None] = lambda name, fetched: None
    ) -> None:
        """Copy files into a local folder; each appears there complete or not at all.

        accept: raises an error if a file must not appear.  Several processes may fetch the same file: each writes to a
        temporary file named after its process.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            draft = folder / f".{name}.{os.getpid()}.tmp"
            try:
                self._system.get_file(f"{self._path}/{name}", str(draft))
                accept(name, draft)
                os.replace(draft, folder / name)
            except UserError:
                raise
            except Exception as error:
                raise self._unreachable(name, error) from error
            finally:
                draft.unlink(missing_ok=True)

    def send(self, folder: Path, names: Iterable[str], description: str) -> int:
        """Upload files, and last the one that describes them; returns how many were uploaded.

        A file that is there in its full length is kept only if it was uploaded with the same description: services
        have no hash in common by which another content of the same length could be told. So files of these names are
        removed before an upload with another one, which a copy, ``<description>.sending``, names until it is finished.
        """
        names = list(names)
        content, mark = (folder / description).read_bytes(), f"{description}.sending"
        finished = self._read(description) == content
        same = finished or self._read(mark) == content
        if not same:
            for name in (description, *names):
                self._remove(name)
            self._put(folder / description, mark)
        sent = [name for name in names if self.size(name) != (folder / name).stat().st_size]
        sent += [] if finished else [description]
        for name in sent:
            self._put(folder / name, name)
        self._remove(mark)
        return len(sent)

    def _read(self, name: str) -> bytes | None:
        """The content of a small file; None if there is no such file."""
        try:
            return bytes(self._system.cat_file(f"{self._path}/{name}"))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._unreachable(name, error) from error

    def _put(self, file: Path, name: str) -> None:
        try:
            self._system.makedirs(self._path, exist_ok=True)
            self._system.put_file(str(file), f"{self._path}/{name}")
        except Exception as error:
            raise self._unreachable(name, error) from error

    def _remove(self, name: str) -> None:
        try:
            self._system.rm_file(f"{self._path}/{name}")
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._unreachable(name, error) from error

    def _unreachable(self, name: str, error: Any) -> EnvironmentProblem:
        return EnvironmentProblem(f"{self.url}/{name}: {type(error).__name__}: {error}")
