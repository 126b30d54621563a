"""The exceptions of the package: everything that a user can correct is a ``UserError``.

The programs catch ``UserError`` in one place and print its message; any other exception is a bug in this package.
"""

from __future__ import annotations

import errno
import os


class UserError(ValueError):
    """Something that the user can correct. The message says what was found, where, and what to do."""


class ConfigError(UserError):
    """Settings: an unknown key, a wrong value, an impossible combination, or a file that cannot be read."""


class DataError(UserError):
    """Preference pairs, scores or a cache: missing, damaged, or made with other settings."""


class ModelError(UserError):
    """Networks or their weights: missing, incomplete, or of an unsupported kind."""


class CheckpointError(UserError):
    """A checkpoint that a run cannot resume from."""


class EnvironmentProblem(UserError):
    """The machine: a missing package or GPU, a full or read-only disk, no file locks, no network."""


_ADVICE = {
    errno.EMFILE: "this process has too many open files: raise its limit (ulimit -n)",
    errno.ENFILE: "the machine has too many open files",
    errno.ENOMEM: "there is not enough memory or address space (see ulimit -v and vm.max_map_count)",
    errno.EAGAIN: "no more threads or processes can be started: raise the limit (ulimit -u)",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is exhausted",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system has lost the file",
    errno.ENOTDIR: "a file is where a folder is needed",
    errno.EISDIR: "a folder is where a file is needed",
    errno.EEXIST: "something else has this name",
    errno.ENAMETOOLONG: "the name is too long",
}


def environment_problem(error: BaseException, subject: object) -> EnvironmentProblem | None:
    """The same error as an EnvironmentProblem, if the machine is its cause; None if it may be the data.

    subject: what was being read or written.
    """
    number = _error_number(error)
    return EnvironmentProblem(f"{subject}: {_ADVICE[number]} ({error})") if number in _ADVICE else None


def check_not_exhausted(error: BaseException, subject: object) -> None:
    """Raise EnvironmentProblem if the machine has run out of something: then the error says nothing about the data.

    For what is read and may be left out, such as a picture of many: unlike ``environment_problem`` this does not count
    a file that may not be read, or a disk that cannot read it, as a problem of the machine.
    """
    if _error_number(error) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN):
        problem = environment_problem(error, subject)
        assert problem is not None
        raise problem from error


def _error_number(error: BaseException) -> int | None:
    """The error number of an exception; some libraries give it only in words."""
    text = str(error)
    if isinstance(error, MemoryError) or "Cannot allocate memory" in text:
        return errno.ENOMEM
    if "can't start new thread" in text or "Resource temporarily unavailable" in text:
        return errno.EAGAIN
    for number in (errno.EMFILE, errno.ENOSPC, errno.EROFS, errno.EDQUOT):
        if os.strerror(number) in text:
            return number
    return error.errno if isinstance(error, OSError) else None
