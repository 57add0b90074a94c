"""Which members of a tar shard form a pair, by their names; all other members are counted, not silently dropped.

A name is a key and an ending: the key ends at the last dot that leaves a known ending, so that ``dr. who.jpg`` and
``dr. who.txt`` are a pair. webdataset cuts at the first dot, and gives the two members different endings.
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
    """Whether it is a file, and not a link or device."""
    offset: int
    """The size of its data in bytes."""
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
    """The pairs in the order of their first members, and the members that are left out; ``shard`` is for their names.

    The first of several members with the same kind and key counts; but a name that is repeated after its pair is
    complete begins another pair, as in a file to which a second shard was appended.
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
    if ".." in parts:  # nothing is extracted, but the name may be written out by ``pack``
        return "names with .. in them"
    if not member.regular:
        return "links (tar --dereference --hard-dereference stores what they lead to)"
    if not kind:
        return f"files that are not read, {_ending(member.name)}"
    return f"files larger than {MAX_BYTES >> 20} MiB" if member.size > MAX_BYTES else ""


def _shorter(key: str) -> Iterator[str]:
    """The key without its last part after a dot, then without the last two, and so on; dots in folders do not count."""
    while "." in key.rpartition("/")[2]:
        key = key.rpartition(".")[0]
        yield key


def _ending(name: str) -> str:
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    return f"ending in .{ending}" if dot and ending.isalnum() and len(ending) <= 8 else "without a usual ending"
