"""Which members of a tar shard make a pair, by their names; what does not is counted, never dropped in silence.

A name is a key and an ending: the key ends at the last dot that leaves a known ending, so that ``dr. who.jpg`` and
``dr. who.txt`` are a pair. webdataset cuts at the first dot, and makes them two halves of nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from clip_jax.data import images
from clip_jax.data.sources.left_out import LeftOut
from clip_jax.data.valid_text import shown

KINDS = ("image", "txt", "json", "cls")
MAX_BYTES = 256 * 1024 * 1024
NO_LABEL, BAD_LABEL = -1, -2
"""Labels of a sample without ``.cls``, and of one whose ``.cls`` is no number from 0."""


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    offset: int
    size: int
    is_link: bool = False
    data: bytes = b""
    """The content of ``.cls``."""


class Group(NamedTuple):
    """The members of one key."""

    key: str
    members: dict[str, tuple[int, int]]
    """Kind -> offset and size."""
    names: dict[str, str]
    label: list[int]
    """One number, or none."""

    @property
    def is_pair(self) -> bool:
        return "image" in self.members and len(self.members) > 1


def split(name: str) -> tuple[str, str]:
    """Key and kind; the kind is empty for an ending that is not read."""
    key, dot, ending = name.rpartition(".")
    kind = "image" if ending.lower() in images.ENDINGS else ending.lower()
    return (key, kind) if dot and kind in KINDS else (name, "")


def pairs(members: Iterable[Member]) -> tuple[list[Group], LeftOut]:
    """The pairs in the order of their first members, and what is left out.

    Of several members of one kind and key the first one counts; but a name that is repeated after its pair is complete
    begins another pair, which is how two shards in one file look.
    """
    groups: list[Group] = []
    current: dict[str, Group] = {}
    left_out = LeftOut()
    for member in members:
        key, kind = split(member.name)
        name = shown(member.name)
        parts = member.name.split("/")
        if parts[-1].startswith(".") or "__MACOSX" in parts:
            left_out.other("hidden files", name)
        elif member.is_link:
            left_out.other("links (tar --dereference stores the files that they lead to)", name)
        elif not kind:
            left_out.other(f"files that are not read, {_ending(name)}", name)
        elif member.size > MAX_BYTES:
            left_out.other(f"files larger than {MAX_BYTES >> 20} MiB", name)
        else:
            group = current.get(key)
            if group is not None and kind in group.members:
                if not (group.is_pair and group.names[kind] == member.name):
                    left_out.other(f"further {kind} files of the same key", name)
                    continue
                group = None
            if group is None:
                group = current[key] = Group(key, {}, {}, [])
                groups.append(group)
            group.members[kind], group.names[kind] = (member.offset, member.size), member.name
            if kind == "cls":
                group.label.append(_label(member.data))
    made = [group for group in groups if group.is_pair]
    keys = {group.key for group in made}
    for group in groups:
        if group.is_pair:
            continue
        name = shown(next(iter(group.names.values())))
        if keys & set(_shorter(group.key)):  # webdataset's compound endings: 000.seg.png beside 000.jpg
            left_out.other("further files of a pair", name)
        elif "image" in group.members:
            left_out.pair("images without a .txt, .json or .cls", name)
        else:
            left_out.pair(f"captions or labels without an image (images end in {', '.join(images.ENDINGS)})", name)
    return made, left_out


def _shorter(key: str) -> Iterator[str]:
    """The keys that are left when the ends after dots are cut off, without the folder's dots."""
    while "." in key.rpartition("/")[2]:
        key = key.rpartition(".")[0]
        yield key


def _ending(name: str) -> str:
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f"ending in .{ending}" if dot and ending.isalnum() and len(ending) <= 8 else "without a usual ending"


def _label(data: bytes) -> int:
    text = data.strip()
    return int(text) if text.isdigit() and len(text) < 10 else BAD_LABEL


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
