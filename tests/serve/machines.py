"""`Machines`: machines made of Linux namespaces. Each has a network address and a name; they have folders in common."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

_NEEDED = ("unshare", "nsenter", "ip", "mount", "chroot")
_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc")
_NETWORK = "10.77.0"
_PREPARE = """
set -e
root=$1 hosts=$2; shift 2
mount -t tmpfs none /run
mkdir /run/netns
ip link set lo up
ip link add bridge type bridge
ip addr add NETWORK.1/24 dev bridge
ip link set bridge up
while read -r address name; do
    ip netns add "$name"
    ip link add "v${address##*.}" type veth peer name eth0 netns "$name"
    ip link set "v${address##*.}" master bridge up
    ip -n "$name" addr add "$address/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
    ip -n "$name" route add default via NETWORK.1
    mkdir "/run/$name"
done < "$hosts"
mount -t tmpfs none "$root"
for one in /*; do
    if [ -L "$one" ]; then cp -d "$one" "$root/"
    elif [ -d "$one" ]; then mkdir "$root$one"; mount --rbind "$one" "$root$one"
    fi
done
mount --bind "$hosts" "$root/etc/hosts"
[ -L /etc/resolv.conf ] || mount --bind /dev/null "$root/etc/resolv.conf"
while [ $# -gt 0 ]; do
    if [ -d "$1" ]; then mkdir -p "$root$2"; else touch "$root$2"; fi
    mount --bind "$1" "$root$2"
    shift 2
done
echo ready
read -r _
""".replace("NETWORK", _NETWORK)


def missing() -> str | None:
    """The reason why this system cannot make machines, or None."""
    if sys.platform != "linux" or (lacking := [name for name in _NEEDED if shutil.which(name) is None]):
        return f"needs Linux and {', '.join(lacking or _NEEDED)}"
    trial = [*_UNSHARE, "ip", "link", "add", "bridge", "type", "bridge"]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


class Machines:
    """Machines that see the file system of this one, and ``folders``: pairs of a path here and the path there."""

    def __init__(self, names: Sequence[str], folders: Sequence[tuple[Path, str]], place: Path) -> None:
        self.addresses = {name: f"{_NETWORK}.{number}" for number, name in enumerate(names, start=2)}
        self._root, hosts = place / "root", place / "hosts"
        self._root.mkdir()
        hosts.write_text("".join(f"{address} {name}\n" for name, address in self.addresses.items()))
        arguments = [str(one) for pair in folders for one in pair]
        self._first = subprocess.Popen(
            [*_UNSHARE, "--kill-child", "sh", "-c", _PREPARE, "sh", str(self._root), str(hosts), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout
        if self._first.stdout.readline() != "ready\n":
            raise OSError("no namespaces")
        (self._holder,) = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()

    def command(self, name: str, command: Sequence[str], variables: Mapping[str, str], folder: str) -> list[str]:
        """The command line that runs a command on a machine, in a folder, with these variables and nothing else."""
        given = {"HOME": f"/run/{name}", "RAY_TMPDIR": f"/run/{name}", **variables}
        enter = ["nsenter", "--target", self._holder, "--user", "--net", "--mount", "--pid"]
        inside = ["ip", "netns", "exec", name, "chroot", str(self._root), "env", "-i", "-C", folder]
        return [*enter, *inside, *(f"{key}={one}" for key, one in given.items()), *command]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End all that runs on the machines: their first process has ended."""
        self._first.kill()
        self._first.communicate()
