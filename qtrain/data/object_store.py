"""Files at an address, ``s3://bucket/path``, ``gs://``, ``hf://``, ``memory://`` or ``file://``, through fsspec.

Endpoint and credentials are fsspec's and its libraries' own business (``AWS_ENDPOINT_URL``, ``AWS_PROFILE``,
``FSSPEC_S3_...``, their files): no address or configuration holds any. What a network does is tried again with growing
pauses; what trying again cannot mend (no such object, no permission, no credentials) is said at once.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from qtrain.data.optional_libraries import LibraryMissing, optional_library
from qtrain.data.read_ahead import StreamError, of_networks

T = TypeVar("T")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
# Seconds between attempts, beside those that s3fs makes itself (5)
BACKOFF = (1.0, 4.0, 16.0)
# Scheme -> the library that fsspec needs for it; other schemes are named by fsspec itself
_LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
# Errors by name, since their libraries are optional
_REFUSED = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}
)


class StoreUnreachable(StreamError, ValueError):
    """An object store does not answer, or does not let us in: under a run the end of its data for now, and before it a
    value that is refused."""


class ObjectMissing(FileNotFoundError):
    """Nothing lies at an address, in a store that answers."""


def is_address(place: object) -> bool:
    """Whether ``place`` is an address of fsspec and no path."""
    return isinstance(place, str) and _SCHEME.match(place) is not None


def check_address(address: str) -> str:
    """``address`` without a slash at its end. Raises ValueError for what is none, or holds credentials."""
    found = _SCHEME.match(address)
    if found is None or not address[found.end() :].strip("/"):
        raise ValueError(
            f"{address!r} is no address; write it as s3://bucket/path (gs://, hf://, memory://, file:///path)"
        )
    authority = address[found.end() :].split("/")[0]
    if "?" in address or (found[1] != "hf" and "@" in authority):
        raise ValueError(
            f"the address {found[0]}... holds more than a place; configurations are saved with runs, so leave credentials and "
            "endpoints to the environment (AWS_PROFILE, AWS_ENDPOINT_URL and the like)"
        )
    return address.rstrip("/")


class ObjectStore:
    """The objects below ``address``, by relative name. Pickled and forked copies connect anew.

    All methods raise StoreUnreachable, with address and error, where the store does not answer or refuses, and
    ObjectMissing where there is no such object.
    """

    def __init__(self, address: str) -> None:
        self.address = check_address(address)
        self._connected: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": None}

    def at(self, name: str) -> str:
        return f"{self.address}/{name}"

    def below(self, name: str) -> ObjectStore:
        return ObjectStore(self.at(name))

    def _files(self) -> tuple[Any, str]:
        """(file system, path of ``address`` in it). Raises LibraryMissing."""
        if self._connected is None or self._connected[0] != os.getpid():
            fsspec = optional_library("fsspec", needed_for=self.address)
            for talker in ("aiobotocore", "botocore"):  # a line for each place where they found something
                logging.getLogger(talker).setLevel(logging.WARNING)
            scheme = self.address.split("://")[0]
            try:
                # A listing that is kept would hide what others write
                files, path = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
            except ImportError as error:
                library = _LIBRARIES.get(scheme)
                command = f"pip install {library}" if library else str(error)
                raise LibraryMissing(
                    f"{self.address} needs a library that is not installed: {command}"
                ) from error
            except ValueError as error:
                raise ValueError(f"{self.address}: {error}") from error
            self._connected = (os.getpid(), files, path)
        return self._connected[1], self._connected[2]

    def _tried(self, name: str, action: Callable[[Any, str], T]) -> T:
        """``action(file system, path of name)``, again after errors that may pass."""
        for pause in (*BACKOFF, None):
            try:
                files, path = self._files()
                return action(files, f"{path}/{name}" if name else path)
            except (LibraryMissing, MemoryError):
                raise
            except FileNotFoundError as error:
                raise ObjectMissing(f"there is no object {self.at(name)}") from error
            except Exception as error:
                refused = isinstance(error, PermissionError) or type(error).__name__ in _REFUSED
                if refused:
                    raise StoreUnreachable(
                        f"{self.at(name)} cannot be reached: the store refuses ({_said(error)}); see to the credentials in the "
                        "environment or the library's own files; the run goes on from its last checkpoint with resume=auto"
                    ) from error
                if not of_networks(error):
                    raise
                if pause is None:
                    raise StoreUnreachable(
                        f"{self.at(name)} cannot be reached, {len(BACKOFF) + 1} attempts in a row: {_said(error)}; when the store "
                        "answers again, the run goes on from its last checkpoint with resume=auto"
                    ) from error
                print(f"{self.at(name)}: {_said(error)}; again in {pause:g} s", file=sys.stderr, flush=True)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def read(self, name: str) -> bytes:
        """A small object whole."""
        return self._tried(name, lambda files, path: files.cat_file(path))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop); fewer where the object ends before."""
        return self._tried(name, lambda files, path: files.cat_file(path, start=start, end=stop))

    def size(self, name: str) -> int:
        return int(self._tried(name, lambda files, path: files.info(path))["size"])

    def has(self, name: str) -> bool:
        try:
            self.size(name)
        except ObjectMissing:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """Of the objects directly in ``folder``, without its name; empty where there are none."""
        try:
            found = self._tried(folder, lambda files, path: files.ls(path, detail=True))
        except ObjectMissing:
            return []
        return sorted(
            entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "file"
        )

    def found(self, pattern: str | None = None) -> dict[str, dict[str, Any]]:
        """Objects below this address, by their name in it, with what the store says of each; "" is the object at the
        address itself. pattern: only those that a glob pattern, without the scheme, matches."""

        def list_(files: Any, path: str) -> dict[str, dict[str, Any]]:
            if pattern is None:
                listed = files.find(path, detail=True)
            else:
                listed = files.glob(
                    files._strip_protocol(f"{self.address.split('://')[0]}://{pattern}"), detail=True
                )
            kept = {name: info for name, info in listed.items() if info["type"] == "file"}
            return {name.removeprefix(path).lstrip("/"): info for name, info in kept.items()}

        try:
            return self._tried("", list_)
        except ObjectMissing:
            return {}

    def write_file(self, local: Path, name: str) -> None:
        """Uploads a file; an object is there whole or not at all, as the store keeps it."""

        def put(files: Any, path: str) -> None:
            if self.address.startswith(
                ("file://", "local://")
            ):  # elsewhere a folder is no thing, or a bucket
                files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            files.put_file(str(local), path)

        self._tried(name, put)


def _said(error: BaseException) -> str:
    """The error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
