"""Tar and zip files, read in place: an index says where the bytes of each file in them are.

The index of a large archive is kept in the cache folder, below `indexes`.
"""

import contextlib
import hashlib
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from twostage.core.cache_files import cache_folder, replacing_in_cache
from twostage.core.errors import InputError
from twostage.core.machine.progress import announced
from twostage.core.wording import one_line, printable

__all__ = ["ARCHIVE_SUFFIXES", "Member", "list_members", "read_member"]

ARCHIVE_SUFFIXES = {".tar", ".zip"}
MIN_CACHED = 1_000
"""Archives with fewer files are indexed at each start."""
MAX_SIZE = 512 * 2**20
"""Larger files are not unpacked into memory: an image of 89 million pixels in 8-bit colour has half as many bytes."""
_BLOCK = 512
_LOCAL_HEADER, _ENCRYPTED = 30, 1
_AGAIN = "Copy the file again, or remove it"


class Member(NamedTuple):
    """A file in an archive."""

    archive: Path
    name: str
    """Its path in the archive, which leads nowhere else."""
    offset: int
    """Of its bytes in the archive."""
    stored: int
    """Bytes in the archive."""
    size: int
    deflated: bool
    crc: int | None
    """The checksum in a zip file."""


def read_member(member: Member) -> bytes:
    """The content of a file in an archive.

    Raises:
        OSError: the archive cannot be read.
        ValueError: the content is damaged, or too large.
    """
    if member.size > MAX_SIZE:
        raise ValueError(f"{member.size:,} bytes when unpacked, expected at most {MAX_SIZE:,}")
    with member.archive.open("rb") as file:
        file.seek(member.offset)
        content = file.read(member.stored)
    if member.deflated:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.size + 1)
        except zlib.error as error:
            raise ValueError(f"damaged in its archive: {error}") from None
    if len(content) != member.size or (member.crc is not None and zlib.crc32(content) != member.crc):
        raise ValueError("damaged in its archive")
    return content


def list_members(archive: Path) -> list[Member]:
    """The files in an archive, without folders, links and other entries, in their order.

    Raises:
        InputError: the archive is damaged, encrypted or compressed in another way, or has two files of one name.
    """
    stat = archive.stat()
    key = f"1 {archive.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    index = (
        cache_folder() / "indexes" / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    )
    with contextlib.suppress(OSError, ValueError, TypeError):  # missing or damaged: read the archive
        return [Member(archive, *row) for row in json.loads(index.read_text(encoding="utf-8"))]
    find = _tar_members if archive.suffix.lower() == ".tar" else _zip_members
    members: dict[str, Member] = {}
    with announced(f"indexing {printable(archive)} ..."):
        for member in find(archive):
            if members.setdefault(member.name, member) is not member:
                raise InputError(
                    f"data.source {printable(archive)}: has two files named {printable(member.name)}, expected one. "
                    "Write the archive again with different names"
                )
    if len(members) >= MIN_CACHED:
        with contextlib.suppress(OSError), replacing_in_cache(index) as partial:
            partial.write_text(json.dumps([member[1:] for member in members.values()]), encoding="utf-8")
    return list(members.values())


def _tar_members(archive: Path) -> Iterator[Member]:
    try:
        with tarfile.open(archive, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if info.isreg() and not info.issparse():
                    yield Member(archive, _inside(info.name), info.offset_data, info.size, info.size, False, None)
            end = tar.offset  # type: ignore[attr-defined]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(
            f"data.source {printable(archive)}: not a readable .tar file ({one_line(error)}). {_AGAIN}"
        ) from None
    with archive.open("rb") as file:  # tarfile ends silently at a damaged header
        file.seek(end)
        if file.read(_BLOCK).strip(b"\0"):
            raise InputError(
                f"data.source {printable(archive)}: damaged: byte {end:,} should begin the next file, but does not. "
                f"{_AGAIN}"
            )


def _zip_members(archive: Path) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(archive) as opened, archive.open("rb") as file:
            infos = [info for info in opened.infolist() if not info.is_dir()]
            for info in infos:
                _check_zip_entry(archive, info)
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER)
                if header[:4] != b"PK\3\4" or len(header) < _LOCAL_HEADER:
                    raise zipfile.BadZipFile(f"no file begins at byte {info.header_offset:,}")
                lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                offset = info.header_offset + _LOCAL_HEADER + lengths
                deflated = info.compress_type == zipfile.ZIP_DEFLATED
                yield Member(
                    archive, _inside(info.filename), offset, info.compress_size, info.file_size, deflated, info.CRC
                )
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise InputError(
            f"data.source {printable(archive)}: not a readable .zip file ({one_line(error)}). {_AGAIN}"
        ) from None


def _check_zip_entry(archive: Path, info: zipfile.ZipInfo) -> None:
    if info.flag_bits & _ENCRYPTED:
        raise InputError(
            f"data.source {printable(archive)}: {printable(info.filename)} is encrypted, expected a zip file without a "
            "password. Unpack it into a folder, and set data.source to that"
        )
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(
            f"data.source {printable(archive)}: {printable(info.filename)} is compressed by method "
            f"{info.compress_type}, expected deflate or none. Unpack it into a folder, and set data.source to that"
        )


def _inside(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
