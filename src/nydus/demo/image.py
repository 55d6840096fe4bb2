"""A real multi-layer image made of what is on this machine: its Python, some packages we need anyway, an app.

Nothing is downloaded. Files keep the time and mode they have here (so that compiled Python stays valid) and
come in sorted order with owner 0: the same machine gives the same image.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, cast

from isal import isal_zlib

from nydus.errors import NydusError

PREFIX = "usr/local"
PACKAGES = ("numpy", "pillow", "rich")
ENV = (
    f"PATH=/{PREFIX}/bin:/usr/bin:/bin",
    f"PYTHONHOME=/{PREFIX}",
    "HOME=/tmp",
)
COMMAND = ("python3", "/app/main.py")
APP = b"""\
import hashlib
import json
import sys

expected = json.load(open("/app/expected.json"))
with open("/app/data.bin", "rb") as file:
    file.seek(expected["offset"])
    found = hashlib.sha256(file.read(expected["size"])).hexdigest()
assert found == expected["sha256"], "the data is not what was packed"
print(f"hello from Python {sys.version.split()[0]}: the data is intact", flush=True)
"""
SKIPPED = re.compile(
    r"^(test|idlelib|turtledemo|tkinter|_tkinter.*|lib2to3|ensurepip|site-packages|dist-packages|config-.*)$"
)
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}

Entry = tuple[str, "Path | bytes | None"]
"""A path in the layer (no leading slash) and its content.

That is a file or symlink here, None for a directory, or bytes; ``->`` and a path are the target of a symlink.
"""


@dataclass(frozen=True)
class Layer:
    """One gzip layer of the layout; sizes in bytes."""

    title: str
    digest: str
    size: int
    diff_id: str
    unpacked: int
    files: int


@dataclass(frozen=True)
class DemoImage:
    """An image in an OCI layout.

    Attributes:
        layout: folder of the layout; its only manifest is tagged ``latest``.
        manifest: digest of the manifest.
    """

    layout: Path
    manifest: str
    layers: list[Layer]

    @property
    def size(self) -> int:
        """Compressed bytes of all layers."""
        return sum(layer.size for layer in self.layers)

    @property
    def unpacked(self) -> int:
        """Bytes of all layers as tar."""
        return sum(layer.unpacked for layer in self.layers)

    @property
    def files(self) -> int:
        return sum(layer.files for layer in self.layers)


def build(layout: Path, progress: Callable[[str, int], None] = lambda title, size: None) -> DemoImage:
    """Make the image in the new folder ``layout``.

    ``progress(title, size)`` hears after each file how many bytes of tar the layer ``title`` has so far.
    """
    if shutil.which("ldd") is None:
        raise NydusError("the demo needs the program 'ldd', which is not installed")
    layout.mkdir(parents=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "blobs" / "sha256").mkdir(parents=True)
    layers = [
        _layer(layout, title, entries, partial(progress, title))
        for title, entries in (
            ("base", _base()),
            ("python", _python()),
            ("packages", _packages()),
            ("app", _app()),
        )
    ]
    config = {
        "created": "1970-01-01T00:00:00Z",
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Env": list(ENV), "Cmd": list(COMMAND), "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created_by": f"nydus demo: {layer.title}"} for layer in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _store(layout, "application/vnd.oci.image.config.v1+json", config),
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": layer.digest,
                "size": layer.size,
            }
            for layer in layers
        ],
    }
    descriptor = _store(layout, "application/vnd.oci.image.manifest.v1+json", manifest)
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{**descriptor, "annotations": {"org.opencontainers.image.ref.name": "latest"}}],
    }
    (layout / "index.json").write_text(json.dumps(index))
    return DemoImage(layout, str(descriptor["digest"]), layers)


def _store(layout: Path, media_type: str, document: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(document, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


# What goes into each layer.


def _base() -> list[Entry]:
    """Busybox (or this machine's ``sh``), the C library and what else the layers above link to."""
    entries: list[Entry] = [
        ("etc/passwd", b"root:x:0:0:root:/tmp:/bin/sh\n"),
        ("etc/group", b"root:x:0:\n"),
        *((name, None) for name in ("dev", "proc", "sys", "run", "tmp", "app")),
    ]
    if busybox := _static_busybox():
        entries.append(("bin/busybox", busybox))
        applets = subprocess.run(
            [busybox, "--list"], capture_output=True, text=True, check=True
        ).stdout.split()
        entries += [(f"bin/{name}", b"->busybox") for name in applets if name != "busybox"]
        programs = [Path(sys.executable)]
    else:
        shell = Path("/bin/sh").resolve()
        entries.append(("bin/sh", shell))
        programs = [Path(sys.executable), shell]
    extensions = (
        path for _, path in _python() + _packages() if isinstance(path, Path) and ".so" in path.suffixes
    )
    return entries + _libraries([*programs, *extensions])


def _static_busybox() -> Path | None:
    """Busybox with no libraries to bring along, if there is one."""
    found = shutil.which("busybox")
    if found is None:
        return None
    linked = subprocess.run(["ldd", found], capture_output=True, text=True, check=False)
    return None if "=>" in linked.stdout else Path(found)


def _libraries(programs: list[Path]) -> list[Entry]:
    """The shared objects that ``programs`` load, found by ``ldd``.

    All go where the C library is, which the loader searches whatever else its configuration says; the loader
    itself keeps its path, because programs name it in full. Libraries inside a package stay there.
    """
    answer = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False).stdout
    found = {
        name: Path(path)
        for name, path in re.findall(r"(\S+) => (/\S+)", answer)
        if "site-packages" not in path and "dist-packages" not in path
    }
    loader = {Path(path) for path in re.findall(r"^\s+(/\S+) \(", answer, re.MULTILINE)}
    libc = next((path for name, path in found.items() if name.startswith("libc.")), None)
    if libc is None:
        raise NydusError("ldd does not say which C library this machine's Python uses")
    folder = str(libc.parent).lstrip("/")
    return [
        *((f"{folder}/{name}", path.resolve()) for name, path in found.items()),
        *((str(path).lstrip("/"), path.resolve()) for path in loader),
    ]


def _python() -> list[Entry]:
    """The interpreter and its standard library, at the place that PYTHONHOME names."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    base = Path(sys.base_prefix)
    entries: list[Entry] = [
        (f"{PREFIX}/bin/{stdlib.name}", Path(sys.executable).resolve()),
        (f"{PREFIX}/bin/python3", f"->{stdlib.name}".encode()),
    ]
    return entries + list(_walk(stdlib, f"{PREFIX}/{stdlib.relative_to(base)}"))


def _packages() -> list[Entry]:
    """`PACKAGES` and what they require, as they are installed here, and their shared objects."""
    target = f"{PREFIX}/{sys.platlibdir}/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    files: dict[str, Path] = {}
    for distribution in _closure(PACKAGES):
        for name in distribution.files or ():
            path = Path(str(distribution.locate_file(name)))
            if not str(name).startswith("..") and path.is_file():
                files[f"{target}/{name}"] = path
    return list(files.items())


def _closure(names: tuple[str, ...]) -> list[metadata.Distribution]:
    """The distributions called ``names`` and, recursively, what they require (extras apart)."""
    found: dict[str, metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # required on other platforms or Python versions only
        for requirement in found[name].requires or ():
            if "extra ==" not in requirement:
                todo.append(cast(re.Match[str], re.match(r"[\w.-]+", requirement)).group())
    return [found[name] for name in sorted(found)]


def _app() -> list[Entry]:
    """A program and 8 MiB of data that do not compress, of which it reads and checks 256 KiB."""
    data = hashlib.shake_256(b"nydus demo").digest(8 << 20)
    offset, size = 4 << 20, 256 << 10
    expected = {
        "offset": offset,
        "size": size,
        "sha256": hashlib.sha256(data[offset : offset + size]).hexdigest(),
    }
    return [
        ("app/main.py", APP),
        ("app/data.bin", data),
        ("app/expected.json", json.dumps(expected).encode()),
    ]


def _walk(path: Path, name: str) -> Iterator[Entry]:
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            if not SKIPPED.match(child.name):
                yield from _walk(child, f"{name}/{child.name}")
    elif path.exists():
        yield name, path


# How a layer is written.


@dataclass
class _Gzip:
    """A write-only file: tar in, gzip out to ``sink``, with the digests and sizes of both."""

    sink: BinaryIO
    plain: Any = field(default_factory=hashlib.sha256)
    packed: Any = field(default_factory=hashlib.sha256)
    plain_size: int = 0
    packed_size: int = 0

    def __post_init__(self) -> None:
        self._compressor = isal_zlib.compressobj(3, wbits=31)

    def write(self, data: bytes) -> int:
        self.plain.update(data)
        self.plain_size += len(data)
        self._put(self._compressor.compress(data))
        return len(data)

    def finish(self) -> None:
        self._put(self._compressor.flush())

    def _put(self, data: bytes) -> None:
        self.packed.update(data)
        self.packed_size += len(data)
        self.sink.write(data)


def _layer(layout: Path, title: str, entries: list[Entry], progress: Callable[[int], None]) -> Layer:
    """Write ``entries`` and the directories above them as one gzip layer."""
    contents: dict[str, Path | bytes | None] = dict(entries)
    for name in list(contents):
        for parent in Path(name).parents[:-1]:
            contents.setdefault(str(parent), None)
    unfinished = layout / "blobs" / "unfinished"
    with open(unfinished, "wb") as sink:
        out = _Gzip(sink)
        with tarfile.open(
            fileobj=cast(BinaryIO, out), mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20
        ) as tar:
            for name in sorted(contents):
                _add(tar, name, contents[name])
                progress(tar.offset)
        out.finish()
    digest = out.packed.hexdigest()
    unfinished.rename(layout / "blobs" / "sha256" / digest)
    return Layer(
        title,
        f"sha256:{digest}",
        out.packed_size,
        f"sha256:{out.plain.hexdigest()}",
        out.plain_size,
        len(contents),
    )


def _add(tar: tarfile.TarFile, name: str, content: Path | bytes | None) -> None:
    info = tarfile.TarInfo(name)
    if content is None:
        info.type, info.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
        tar.addfile(info)
    elif isinstance(content, bytes):
        if content.startswith(b"->"):
            info.type, info.linkname = tarfile.SYMTYPE, content[2:].decode()
            tar.addfile(info)
        else:
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))
    elif content.is_symlink():
        info.type, info.linkname = tarfile.SYMTYPE, str(content.readlink())
        tar.addfile(info)
    else:
        status = content.stat()
        info.size, info.mtime, info.mode = status.st_size, int(status.st_mtime), stat.S_IMODE(status.st_mode)
        with open(content, "rb") as file:
            tar.addfile(info, file)
