"""python tests/offline.py COMMAND...: run a command in a network with only this machine's loopback, so that none of its
processes can reach another machine. If the system does not allow that, print a warning and run it anyway."""

import ctypes
import fcntl
import os
import socket
import struct
import sys

NEW_NETWORK = 0x40000000  # CLONE_NEWNET
SET_FLAGS, UP = 0x8914, 0x1  # SIOCSIFFLAGS, IFF_UP


def leave_the_network() -> bool:
    """Move this process to an empty network; return whether that worked."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "unshare") or library.unshare(NEW_NETWORK):
        return False
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh", b"lo", UP))
    return True


if __name__ == "__main__":
    if leave_the_network():
        print("offline: only this machine can be reached")
    else:
        print("not offline: only root may leave the network on this system", file=sys.stderr)
    sys.stdout.flush()
    os.execvp(sys.argv[1], sys.argv[1:])
