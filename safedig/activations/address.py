"""A folder on local disk or at any fsspec address, in which files appear whole or not at all. The door to `fsspec`."""

import errno
import os
import shutil
from contextlib import suppress
from glob import escape
from os import PathLike
from pathlib import Path, PurePosixPath

from ..config import UsageError
from ..storage import write_atomically

_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoreError(UsageError):
    """A store that is damaged, unfinished or out of room; the message names the file and what to do."""


class Address:
    """Names in it are relative and use '/'; a folder comes into being with the first file in it."""

    def __init__(self, address: "str | PathLike[str] | Address", below: str = ""):
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(address, Address):
            self._fs, root, self.local = address._fs, address.root, address.local
        else:
            try:
                self._fs, root = url_to_fs(str(address))
            except (ImportError, ValueError) as error:
                raise StoreError(
                    f"'{address}' cannot be reached: {error}. Give a folder, or an address of a protocol that fsspec "
                    "knows, with its package installed."
                ) from error
            self.local = isinstance(self._fs, LocalFileSystem)
        self.root = f"{root.rstrip('/')}/{below}".rstrip("/")

    def __str__(self) -> str:
        return self.root if self.local else self._fs.unstrip_protocol(self.root)

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file there, or raise and leave what was there; object stores do so by themselves."""
        path = f"{self.root}/{name}"
        try:
            if self.local:
                write_atomically(Path(path), data)
            else:
                self._fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
                self._fs.pipe_file(path, data)
        except OSError as error:
            why = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
            raise StoreError(
                f"'{self}/{name}' cannot be written: {why}. What was written before is kept; record again."
            ) from error

    def read(self, name: str) -> bytes:
        """A whole file; FileNotFoundError if it is not there."""
        return self._fs.cat_file(f"{self.root}/{name}")

    def read_into(self, name: str, start: int, room: memoryview) -> bool:
        """Fill `room` with the file's bytes from `start` on; False if the file is missing or ends before."""
        path = f"{self.root}/{name}"
        try:
            if not self.local:
                data = self._fs.cat_file(path, start, start + len(room))
                room[: len(data)] = data
                return len(data) == len(room)
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                done = 0
                while done < len(room) and (count := file.readinto(room[done:])):
                    done += count
                return done == len(room)
        except FileNotFoundError:
            return False

    def expect(self, name: str, start: int, size: int) -> None:
        """Have a local disk begin to read these bytes, which will be asked for soon; a hint, and free."""
        if not (self.local and hasattr(os, "posix_fadvise")):
            return
        with suppress(FileNotFoundError), open(f"{self.root}/{name}", "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        path = f"{self.root}/{name}"
        return self._fs.size(path) if self._fs.exists(path) else None

    def find(self, pattern: str) -> list[str]:
        """Names of the files that match a glob, in order."""
        self._fs.invalidate_cache()  # others may have written since
        found = self._fs.glob(f"{escape(self.root)}/{pattern}")
        return sorted(str(path)[len(self.root) :].lstrip("/") for path in found)

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if it is not there."""
        path = f"{self.root}/{name}"
        if self._fs.exists(path):
            self._fs.rm_file(path)

    def free(self) -> int | None:
        """Bytes that the disk has left; None where there is no telling."""
        if not self.local:
            return None
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free
