"""python tests/offline.py COMMAND...: the command in a network that holds nothing but this machine's loopback, so that
none of its processes can reach any other. Where the system does not allow that, it says so and runs it as it is."""

import ctypes
import fcntl
import os
import socket
import struct
import sys

NEW_NETWORK = 0x40000000  # CLONE_NEWNET
SET_FLAGS, UP = 0x8914, 0x1  # SIOCSIFFLAGS, IFF_UP


def leave_the_network() -> bool:
    """Whether it is left."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "unshare") or library.unshare(NEW_NETWORK):
        return False
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh", b"lo", UP))
    return True


if __name__ == "__main__":
    if leave_the_network():
        print("offline: nothing but this machine can be reached")
    else:
        print("not offline: this system lets nobody but root leave the network", file=sys.stderr)
    sys.stdout.flush()
    os.execvp(sys.argv[1], sys.argv[1:])
