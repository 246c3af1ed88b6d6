"""Checks that no other local user can change the folder in which Ray keeps a node's sockets and logs.

Ray makes it world-writable (mode 0777, without the sticky bit). A user who can reach it can replace a log by
a symlink to any file of the cluster's user, or the sockets that its processes connect to. So it has to lie
inside a folder that keeps others out."""

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import ray
from ray._private import worker as ray_worker

from .errors import SharedRayFolder

log = logging.getLogger(__name__)

ACCEPT = "PDSERVE_ACCEPT_OPEN_RAY"  # "1" in the environment of `pdserve up`
RESTART = (
    "`ray stop; (umask 077; ray get-auth-token --generate > /dev/null); chmod 600 ~/.ray/auth_token; mkdir -p"
    " ~/.pdserve && chmod 700 ~/.pdserve && RAY_AUTH_MODE=token ray start --head"
    " --temp-dir=$HOME/.pdserve/ray`, on other hosts with the same ~/.ray/auth_token and --address=HEAD:PORT"
    " in place of --head; then `RAY_AUTH_MODE=token RAY_ADDRESS=$(cat ~/.pdserve/ray/ray_current_cluster)"
    " pdserve up`"
)
WRITTEN = ("sockets", "logs", "runtime_resources")  # in a session folder


def session_folder() -> Path:
    """Returns this node's session folder of the Ray cluster that this process is connected to."""
    context = ray.get_runtime_context()
    return Path(str(context.get_temp_dir()), str(context.get_session_name()))


def sockets() -> tuple[Path, ...]:
    """Returns the sockets over which this process actually reaches its node, whatever session folder the
    cluster reports."""
    node = ray_worker._global_node
    assert node is not None, "this process is connected to Ray"
    return Path(node.raylet_socket_name), Path(node.plasma_store_socket_name)


def is_accepted() -> bool:
    """Whether this process's environment states that no other user reaches the hosts."""
    return os.environ.get(ACCEPT) == "1"


def check(session: Path, sockets: Iterable[Path], accept: bool) -> None:
    """Raises SharedRayFolder when another user could change the folder or the sockets; with `accept` it only
    warns."""
    weaknesses = (*(weakness_of(session / name) for name in WRITTEN), *map(_weakness_of_socket, sockets))
    weakness = next(filter(None, weaknesses), None)
    if weakness is None:
        return
    message = (
        f"Ray's folder {session} on host {os.uname().nodename} is open to other local users: {weakness}. Any"
        " of them could overwrite files of this user, and run code as this user, through Ray's logs and"
        f" sockets. Restart Ray inside a folder of mode 0700: {RESTART}. Where nobody else reaches the hosts,"
        f" set {ACCEPT}=1 for `pdserve up`"
    )
    if not accept:
        raise SharedRayFolder(message)
    log.warning("%s (it is set)", message)


def _weakness_of_socket(path: Path) -> str | None:
    return weakness_of(path) or (None if path.is_socket() else f"{path} is not a socket")


def weakness_of(folder: Path) -> str | None:
    """Describes how a user other than this one and root could redirect `folder` or change its contents; None
    if impossible.

    Walks down from the root. A directory that others can neither enter nor replace ends the walk: everything
    below is private."""
    for step in (*reversed(folder.parents), folder):
        try:
            status = os.lstat(step)
        except OSError as error:
            return f"{step} cannot be checked ({error.strerror})"
        if status.st_uid not in (os.getuid(), 0):
            return f"{step} belongs to the user with id {status.st_uid}"
        if stat.S_ISLNK(status.st_mode):
            return weakness_of(step.resolve() / folder.relative_to(step))
        if not status.st_mode & 0o011:  # a symlink below may lead outside again
            real = folder.resolve()
            return None if real == folder else weakness_of(real)
        # others cannot replace the next path component
        is_sticky = bool(status.st_mode & stat.S_ISVTX) and step != folder
        if status.st_mode & 0o022 and not is_sticky:
            return f"{step} has mode {stat.S_IMODE(status.st_mode):04o}"
    return None
