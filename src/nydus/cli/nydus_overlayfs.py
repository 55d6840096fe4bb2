"""``nydus-overlayfs``: an overlay mount without the options meant for others.

mount(8) runs it for the type ``fuse.nydus-overlayfs``.
"""

from __future__ import annotations

import ctypes
import os
import sys

_USAGE = "usage: nydus-overlayfs overlay <target> -o <option,option,…>"
_FOREIGN = ("extraoption=", "io.katacontainers.volume=")

# Word -> (flag, whether the word sets or clears it); <sys/mount.h>.
_FLAGS = {
    "defaults": (0, True),
    "ro": (0x1, True),
    "rw": (0x1, False),
    "nosuid": (0x2, True),
    "suid": (0x2, False),
    "nodev": (0x4, True),
    "dev": (0x4, False),
    "noexec": (0x8, True),
    "exec": (0x8, False),
    "sync": (0x10, True),
    "async": (0x10, False),
    "remount": (0x20, True),
    "mand": (0x40, True),
    "nomand": (0x40, False),
    "dirsync": (0x80, True),
    "noatime": (0x400, True),
    "atime": (0x400, False),
    "nodiratime": (0x800, True),
    "diratime": (0x800, False),
    "bind": (0x1000, True),
    "rbind": (0x5000, True),
    "relatime": (0x200000, True),
    "norelatime": (0x200000, False),
    "strictatime": (0x1000000, True),
    "nostrictatime": (0x1000000, False),
}
# MS_* -> MOUNT_ATTR_*
_ATTRIBUTES = {0x1: 0x1, 0x2: 0x2, 0x4: 0x4, 0x8: 0x8, 0x400: 0x10, 0x1000000: 0x20, 0x800: 0x80}
_PATHS = ("lowerdir", "upperdir", "workdir")


def parse_options(text: str) -> tuple[int, str]:
    """Split mount options into the flags and the data of mount(2)."""
    flags, data = 0, []
    for option in split_options(text):
        if option.startswith(_FOREIGN) or not option:
            continue
        if option in _FLAGS:
            flag, on = _FLAGS[option]
            flags = flags | flag if on else flags & ~flag
        else:
            data.append(option)
    return flags, ",".join(data)


def split_options(text: str) -> list[str]:
    """The options between commas; a backslash keeps a comma inside an option, as overlayfs reads it."""
    options, current, escaped = [], "", False
    for character in text:
        if character == "," and not escaped:
            options.append(current)
            current = ""
            continue
        escaped = character == "\\" and not escaped
        current += character
    return [*options, current]


def shorten(data: str) -> tuple[str | None, str]:
    """Make the directories in overlay options relative to their common parent.

    Returns:
        The directory to be in, None if there is no useful one, and the options to use there.
    """
    pairs = [option.partition("=") for option in split_options(data)]
    paths = [path for key, _, value in pairs if key in _PATHS for path in value.split(":")]
    if not paths or not all(path.startswith("/") for path in paths):
        return None, data
    common = os.path.commonpath(paths)
    if common == "/" or common in paths:
        return None, data
    short = [
        f"{key}=" + ":".join(os.path.relpath(path, common) for path in value.split(":"))
        if key in _PATHS
        else key + equals + value
        for key, equals, value in pairs
    ]
    return common, ",".join(short)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments in (["--version"], ["-V"]):
        from nydus import __version__

        print(f"nydus-overlayfs {__version__}")
        return
    if len(arguments) != 4 or arguments[2] != "-o" or arguments[0] != "overlay":
        print(_USAGE, file=sys.stderr)
        sys.exit(1)
    target = os.path.join(os.getcwd(), arguments[1])
    flags, data = parse_options(arguments[3])
    try:
        _mount(target, flags, data)
    except OSError as error:
        print(f"nydus-overlayfs: {target}: cannot mount an overlay: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def _mount(target: str, flags: int, data: str) -> None:
    page = os.sysconf("SC_PAGESIZE")
    if len(os.fsencode(data)) >= page - 512:
        directory, data = shorten(data)
        if directory is not None:
            os.chdir(directory)
    if len(os.fsencode(data)) >= page:  # mount(2) would silently cut it
        _mount_piecemeal(target, flags, data)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"overlay", os.fsencode(target), b"overlay", ctypes.c_ulong(flags), os.fsencode(data)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount_piecemeal(target: str, flags: int, data: str) -> None:
    """One option, and one layer, at a time: Linux 6.5 and newer."""
    from nydus.mount import syscalls

    attributes = sum(attribute for flag, attribute in _ATTRIBUTES.items() if flags & flag)
    with syscalls.FsContext("overlay") as context:
        for option in split_options(data):
            key, equals, value = option.partition("=")
            if key == "lowerdir":
                for layer in value.split(":"):
                    context.set("lowerdir+", layer)
            else:
                context.set(key, value if equals else None)
        context.create()
        mounted = context.mount(attributes)
        try:
            syscalls.attach(mounted, target)
        finally:
            os.close(mounted)
