"""Which members of a tar shard make a pair, by their names; what does not is counted, never dropped in silence.

A name is a key and an ending: the key ends at the last dot that leaves a known ending, so that ``dr. who.jpg`` and
``dr. who.txt`` are a pair. webdataset cuts at the first dot, and makes them two halves of nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from clip_jax.data import images
from clip_jax.data.sources.labels import Labels
from clip_jax.data.sources.left_out import LeftOut
from clip_jax.data.valid_text import shown

KINDS = ("image", "txt", "json", "cls")
MAX_BYTES = 256 * 1024 * 1024


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    regular: bool
    """A file, no link or device."""
    offset: int
    """Of its data, in bytes."""
    size: int


class Group(NamedTuple):
    """The members of one key."""

    key: str
    members: dict[str, Any]
    """Kind -> Member, or anything else with a name, a size and ``regular``."""

    @property
    def is_pair(self) -> bool:
        return "image" in self.members and len(self.members) > 1


def split(name: str) -> tuple[str, str]:
    """Key and kind; the kind is empty for an ending that is not read."""
    key, dot, ending = name.rpartition(".")
    kind = "image" if ending.lower() in images.ENDINGS else ending.lower()
    return (key, kind) if dot and kind in KINDS else (name, "")


def pairs(members: Iterable[Any], shard: str) -> tuple[list[Group], LeftOut]:
    """The pairs in the order of their first members, and what is left out, by names that begin with the shard's.

    Of several members of one kind and key the first one counts; but a name that is repeated after its pair is complete
    begins another pair, which is how two shards in one file look.
    """
    groups: list[Group] = []
    current: dict[str, Group] = {}
    left_out = LeftOut()
    for member in members:
        key, kind = split(member.name)
        if reason := _unread(member, kind):
            left_out.other(reason, full_name(member, shard))
            continue
        group = current.get(key)
        if group is not None and kind in group.members:
            if not (group.is_pair and group.members[kind].name == member.name):
                left_out.other(f"further {kind} files of the same key", full_name(member, shard))
                continue
            group = None
        if group is None:
            group = current[key] = Group(key, {})
            groups.append(group)
        group.members[kind] = member
    made = [group for group in groups if group.is_pair]
    keys = {group.key for group in made}
    for group in groups:
        name = full_name(next(iter(group.members.values())), shard)
        if group.is_pair:
            continue
        if not keys.isdisjoint(_shorter(group.key)):  # webdataset's compound endings: 000.seg.png beside 000.jpg
            left_out.other("further files of a pair", name)
        elif "image" in group.members:
            left_out.pair("images without a .txt, .json or .cls", name)
        else:
            left_out.pair(f"captions or labels without an image (images end in {', '.join(images.ENDINGS)})", name)
    return made, left_out


def labels(groups: Iterable[Group], shard: str, read: Callable[[Any], bytes]) -> Labels:
    """The labels of pairs; ``read`` gives the content of a member."""
    found = Labels()
    for group in groups:
        member = group.members.get("cls")
        if member is not None:
            found = found.with_label(read(member) if member.size <= 32 else b"", full_name(member, shard))
    return found


def full_name(member: Any, shard: str) -> str:
    """Shard and member, for messages."""
    return f"{shown(shard)}/{shown(member.name.removeprefix('./'))}"


def _unread(member: Any, kind: str) -> str:
    """Why a member is not read; empty if it is."""
    parts = member.name.split("/")
    if parts[-1].startswith(".") or "__MACOSX" in parts:
        return "hidden files"
    if not member.regular:
        return "links (tar --dereference --hard-dereference stores what they lead to)"
    if not kind:
        return f"files that are not read, {_ending(member.name)}"
    return f"files larger than {MAX_BYTES >> 20} MiB" if member.size > MAX_BYTES else ""


def _shorter(key: str) -> Iterator[str]:
    """The keys that are left when the ends after dots are cut off, without the folder's dots."""
    while "." in key.rpartition("/")[2]:
        key = key.rpartition(".")[0]
        yield key


def _ending(name: str) -> str:
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f"ending in .{ending}" if dot and ending.isalnum() and len(ending) <= 8 else "without a usual ending"


def name_of(read: Callable[[int, int], bytes], data_offset: int) -> str:
    """The name of the member whose data begins at an offset, from the headers before it: for messages.

    A header has 100 bytes for a name and 155 for its folder; longer names, and in Python's tar files all that are not
    ASCII, are in an extended header before it. ``read(offset, size)`` reads the shard.
    """
    start = max(0, data_offset - 8 * 512)
    blocks = read(start, data_offset - start)
    header = blocks[-512:]
    name, folder = (part.split(b"\0", 1)[0] for part in (header[:100], header[345:500]))
    if header[257:263] == b"ustar\0" and folder:
        name = folder + b"/" + name
    if len(name) >= 99 or b"?" in name or not name.isascii():
        name = _long_name(blocks[:-512]) or name
    return shown(name.removeprefix(b"./"))


def _long_name(blocks: bytes) -> bytes:
    """The name in a GNU or pax extended header at the end of these blocks."""
    for back in range(2, len(blocks) // 512 + 1):
        header, data = blocks[-512 * back :][:512], blocks[-512 * (back - 1) :]
        try:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError:
            continue
        if header[257:262] != b"ustar" or -(-size // 512) != back - 1:
            continue
        if header[156:157] == b"L":
            return data[:size].rstrip(b"\0")
        if header[156:157] == b"x" and b" path=" in data[:size]:
            return data[:size].partition(b" path=")[2].split(b"\n", 1)[0]
    return b""
