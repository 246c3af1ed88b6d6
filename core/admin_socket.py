"""Finds the Unix socket through which a user administers their cluster without a key.

The launcher puts a symlink named by the gRPC server's address into the user's runtime folder; the command
line looks for it there. The folder is for its user alone, and both sides verify that before they use it:
any user can create a folder of that name in /tmp."""

import os
import socket
import stat
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from .errors import PdserveError

RUNTIME_FOLDER = "PDSERVE_RUNTIME_DIR"  # in the environment: overrides the folder's place


class UnsafeFolder(PdserveError):
    """A folder that must be private to this user is not."""


def runtime_folder() -> Path:
    """The folder in which this user's clusters publish their sockets; it may not exist yet."""
    return Path(os.environ.get(RUNTIME_FOLDER) or f"/tmp/pdserve-{os.getuid()}")


def socket_link(address: str) -> Path:
    """The symlink to the socket of the cluster whose gRPC server listens on `address` (HOST:PORT)."""
    host, _, port = address.rpartition(":")
    return runtime_folder() / f"{_canonical(host)}_{port}.sock"


def _canonical(host: str) -> str:
    """Returns one spelling for all notations of an address, and for localhost."""
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    try:
        return ip_address(host).compressed
    except ValueError:
        return host


def prepare() -> None:
    """Creates the runtime folder unless it exists. Raises UnsafeFolder when it cannot be used."""
    folder = runtime_folder()
    try:
        folder.mkdir(0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise _unsafe(folder, f"it cannot be made ({error.strerror})") from error
    _verify(folder)


def publish(address: str, target: Path) -> None:
    """Makes `target` the socket of the cluster on `address`, in place of a cluster that is gone. Raises
    UnsafeFolder."""
    prepare()
    link = socket_link(address)
    new = link.with_suffix(f".{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            new.unlink()
        new.symlink_to(target)
        new.replace(link)
    except OSError as error:
        raise _unsafe(link.parent, f"no link can be made in it ({error.strerror})") from error


def withdraw(address: str, target: Path) -> None:
    """Removes the symlink, unless another cluster has put its own there. Idempotent."""
    link = socket_link(address)
    with suppress(OSError):  # it is gone, or the folder is
        if link.readlink() == target:
            link.unlink()


def find(address: str) -> Path | None:
    """Returns the socket of a cluster of this user on `address`, or on all addresses and that port, that
    accepts connections.

    Raises UnsafeFolder."""
    port = address.rpartition(":")[2]
    found = (_accepting(socket_link(candidate)) for candidate in (address, f"0.0.0.0:{port}", f"[::]:{port}"))
    return next((path for path in found if path is not None), None)


def find_all() -> list[Path]:
    """Returns the sockets of all clusters of this user on this machine that accept connections. Raises
    UnsafeFolder."""
    found = {_accepting(link) for link in runtime_folder().glob("*.sock")}
    return sorted(path for path in found if path is not None)


def _accepting(link: Path) -> Path | None:
    try:
        _verify(link.parent)
        path = link.readlink()
        _verify(path.parent)  # a cluster that died may have left a symlink to a name that is free for others
    except OSError:  # there is none
        return None
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return None
    return path


def _verify(folder: Path) -> None:
    """Verifies the folder's owner, kind and mode. Raises UnsafeFolder, or FileNotFoundError."""
    status = os.lstat(folder)
    if status.st_uid != os.getuid():
        raise _unsafe(folder, f"it belongs to the user with id {status.st_uid}")
    if not stat.S_ISDIR(status.st_mode):
        raise _unsafe(folder, "it is not a directory", is_ours=True)
    if status.st_mode & 0o077:
        raise _unsafe(folder, f"its mode is {stat.S_IMODE(status.st_mode):04o}", is_ours=True)


def _unsafe(folder: Path, why: str, is_ours: bool = False) -> UnsafeFolder:
    remedy = f"name another in {RUNTIME_FOLDER}" + (", or remove it" if is_ours else "")
    return UnsafeFolder(
        f"{folder}: {why}, expected a directory of user {os.getuid()} with mode 0700; {remedy}"
    )
