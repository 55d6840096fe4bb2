"""``nydus-image inspect``: look around in a bootstrap, at a prompt or by one request."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from nydus.cli import image_source, image_view
from nydus.errors import NydusError

if TYPE_CHECKING:
    from nydus.cli.image_view import View
    from nydus.image import Image
    from nydus.rafs.model import Array

PROMPT = "Inspecting RAFS :> "

_HELP = """
    stats:              Display global rafs metadata
    cd DIR:             Change current directory
    ls:                 Show regulars in current directory
    stat FILE:          Show particular information of regular
    blobs:              Show blob table
    prefetch:           Show prefetch table
    chunk OFFSET:       Show files that own the chunk at this compressed offset
    icheck INODE:       Show path of the inode and basic information
    exit:               Exit
"""


@click.command("inspect", context_settings=image_source.SETTINGS)
@click.argument("positional", metavar="[BOOTSTRAP]", required=False)
@click.option("-B", "--bootstrap", metavar="FILE", help="The bootstrap, or a blob that holds one.")
@click.option(
    "-D", "--blob-dir", metavar="DIR", help="Take from these blobs what the bootstrap does not say."
)
@click.option("-C", "--config", metavar="FILE", help="The same, with the blobs of a configuration.")
@click.option("-R", "--request", metavar="COMMAND", help="Answer one command (as JSON, where it has data).")
def command(
    positional: str | None,
    bootstrap: str | None,
    blob_dir: str | None,
    config: str | None,
    request: str | None,
) -> None:
    """Look around in a bootstrap: at a prompt, or with --request by one command.

    Commands: stats, ls, cd DIR, stat NAME, blobs, prefetch, chunk OFFSET, icheck INODE, help, exit.
    """
    path = image_source.one_bootstrap(positional, bootstrap)
    view = image_view.open_view(path)
    if not blob_dir and not config:
        _run(Inspector(view), request)
        return
    from nydus.build.bootstrap import stem
    from nydus.image import Image

    backend = image_source.open_blobs(blob_dir=blob_dir, config=config)
    with Image(view.tree, backend, stem=stem(path)) as image:
        _run(Inspector(view, image), request)


def _run(inspector: Inspector, request: str | None) -> None:
    if request is not None:
        text, answer = inspector.ask(request)
        shown = "" if answer is not None else text
        click.echo(shown + json.dumps(answer, sort_keys=True, separators=(",", ":")), nl=False)
        return
    while True:
        click.echo(PROMPT, nl=False)
        try:
            line = input()
        except EOFError:
            click.echo()
            return
        if line.strip() in ("exit", "q"):
            return
        if line.strip() == "help":
            click.echo(_HELP)
        elif line.strip():
            try:
                click.echo(inspector.ask(line)[0], nl=False)
            except NydusError as error:
                click.echo(f"Error: {error}")


class Inspector:
    """Answers commands about one bootstrap; remembers the current directory."""

    def __init__(self, view: View, image: Image | None = None) -> None:
        self.view, self.tree, self.image = view, view.tree, image
        self.directory = 0
        self._chunks: Array | None = None

    def ask(self, line: str) -> tuple[str, Any]:
        """The text of a command's answer, and its data for those that have any.

        Raises:
            NydusError: unknown command, or one with a wrong argument.
        """
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        plain: dict[str, Callable[[], tuple[str, Any]]] = {
            "stats": self.stats,
            "ls": self.ls,
            "blobs": self.blobs,
            "prefetch": self.prefetch,
        }
        with_argument: dict[str, Callable[[str], str]] = {
            "cd": self.cd,
            "stat": self.stat,
            "chunk": self.chunk,
            "icheck": self.icheck,
        }
        if name in plain and not argument:
            return plain[name]()
        if name in with_argument and argument:
            return with_argument[name](argument), None
        if name in ("exit", "q"):
            return "", None
        raise NydusError(f"unknown command or wrong argument: {line.strip()!r}; see help")

    def stats(self) -> tuple[str, Any]:
        view, head = self.view, self.view.head
        blobs, prefetch = _tables(view)
        rows = [
            ("Version:", head.version),
            ("Inodes Count:", head.inode_count),
            ("Chunk Size:", f"{head.chunk_size >> 10}KB"),
            ("Root Inode:", head.root),
            ("Flags:", image_view.flag_names(head.flags)),
            ("Blob table offset:", f"{blobs[0]:#x}"),
            ("Blob table size:", f"{blobs[1]:#x}"),
            ("Prefetch table offset:", f"{prefetch:#x}"),
            ("Prefetch table entries:", f"{len(head.prefetch):#x}"),
            ("Chunk table offset:", f"{head.chunk_table[0]:#x}"),
            ("Chunk table size:", f"{head.chunk_table[1]:#x}"),
        ]
        text = "".join(f"    {label:<23} {value}\n" for label, value in rows)
        return f"\n{text}\n", {"inodes_count": head.inode_count}

    def ls(self) -> tuple[str, Any]:
        kinds = {stat.S_IFREG: "-", stat.S_IFDIR: "d", stat.S_IFLNK: "l"}
        lines = []
        for row in self.tree.children(self.directory):
            kind = kinds.get(stat.S_IFMT(int(self.tree.nodes["mode"][row])), " ")
            name = image_view.quoted(self.tree.name(row))
            lines.append(f"{kind}    {int(self.view.numbers[row]):<8} {name}\n")
        return "".join(lines), None

    def cd(self, name: str) -> str:
        row = self._child(name)
        if row is None or not stat.S_ISDIR(int(self.tree.nodes["mode"][row])):
            return f"{name} is not a directory\n"
        self.directory = row
        return ""

    def stat(self, name: str) -> str:
        row = self._child(name)
        return f"{name} was not found\n" if row is None else self._describe(row)

    def blobs(self) -> tuple[str, Any]:
        head = self.view.head
        texts, answer = [], []
        for index, blob in enumerate(self.tree.blobs):
            mapped = head.mapped_blocks[index] if head.mapped_blocks else 0
            rows = [
                ("Blob Index:", index),
                ("Blob ID:", blob.id),
                ("Raw Blob ID:", head.blobs[index].id),
                ("Blob Size:", blob.compressed_size),
                ("Compressed Data Size:", blob.data_size),
                ("Uncompressed Data Size:", blob.uncompressed_size),
                ("Mapped Block Address:", mapped),
                ("Features:", " | ".join(f.name or "" for f in type(blob.features) if blob.features & f)),
                ("Compressor:", blob.compression.name.lower()),
                ("Digester:", blob.digester.name.capitalize()),
                ("Cipher:", blob.cipher.name.lower() if blob.cipher else "None"),
                ("Chunk Size:", f"{blob.chunk_size:#x}"),
                ("Chunk Count:", blob.chunk_count),
                ("Prefetch Table Offset:", blob.readahead_offset),
                ("Prefetch Table Size:", blob.readahead_size),
                ("Meta Compressor:", blob.meta_compression.name.lower()),
                ("Meta Offset:", blob.meta_offset),
                ("Meta Compressed Size:", blob.meta_compressed_size),
                ("Meta Uncompressed Size:", blob.meta_uncompressed_size),
                ("ToC Digest:", blob.toc_digest.hex()),
                ("ToC Size:", blob.toc_size),
                ("RAFS Blob Digest:", blob.rafs_digest.hex()),
                ("RAFS Blob Size:", blob.rafs_size),
            ]
            texts.append("".join(f"{label:<23} {value}\n" for label, value in rows))
            answer.append(
                {
                    "blob_id": blob.id,
                    "readahead_offset": blob.readahead_offset,
                    "readahead_size": blob.readahead_size,
                    "decompressed_size": blob.uncompressed_size,
                    "compressed_size": blob.compressed_size,
                }
            )
        return "\n".join(texts), answer

    def prefetch(self) -> tuple[str, Any]:
        answer = []
        lines = [f"Total Prefetching Files: {len(self.tree.prefetch)}\n"]
        for row in self.tree.prefetch:
            number = int(self.view.numbers[row])
            paths = [self._path(name) for name in self._names(row)]
            answer.append({"inode": number, "path": paths})
            lines += [f'Inode Number:{number:<10} | Path: "{path}"\n' for path in paths]
        return "".join(lines), answer

    def chunk(self, argument: str) -> str:
        offset = _number(argument)
        import numpy as np

        tree, chunks = self.tree, self._all_chunks()
        found = []
        for position in np.flatnonzero((chunks["coffset"] == offset) & (chunks["csize"] > 0)).tolist():
            chunk = chunks[position]
            nodes = tree.nodes
            owners = (nodes["chunk"] <= position) & (position < nodes["chunk"] + nodes["chunk_count"])
            for row in np.flatnonzero(owners).tolist():
                parent = self._path(int(nodes["parent"][row]))
                name = tree.name(row).decode("utf-8", "backslashreplace")
                found.append(
                    f"\nFile: {name:<32} Parent Path: {parent:<32}\n"
                    f"Compressed Offset: {chunk['coffset']}, Compressed Size: {chunk['csize']}\n"
                    f"Decompressed Offset: {chunk['uoffset']}, Decompressed Size: {chunk['usize']}\n"
                    f"Chunk ID: {chunk['digest'].tobytes().hex()},\n"
                    f"Blob ID: {tree.blobs[int(chunk['blob_index'])].id}\n"
                )
        return "".join(found) + ("\n" if found else "")

    def icheck(self, argument: str) -> str:
        import numpy as np

        rows = np.flatnonzero(self.view.numbers == _number(argument)).tolist()
        if not rows:
            raise NydusError(f"there is no inode {argument}")
        return "".join(f"{self._path(row)}\n" for row in rows) + self._describe(rows[0])

    # What the commands are made of

    def _child(self, name: str) -> int | None:
        raw = name.encode("utf-8", "surrogateescape")
        if raw == b".":
            return self.directory
        if raw == b"..":
            return int(self.tree.nodes["parent"][self.directory])
        if raw == b"/":
            return 0
        return next((row for row in self.tree.children(self.directory) if self.tree.name(row) == raw), None)

    def _names(self, row: int) -> list[int]:
        """The rows of all names of an inode."""
        import numpy as np

        return [
            int(other) for other in np.flatnonzero(self.tree.nodes["link"] == self.tree.nodes["link"][row])
        ]

    def _path(self, row: int) -> str:
        path = self.tree.path(row).decode("utf-8", "backslashreplace")
        directory = stat.S_ISDIR(int(self.tree.nodes["mode"][row]))
        return path + "/" if directory and row else path

    def _describe(self, row: int) -> str:
        tree, node = self.tree, self.tree.nodes[row]
        rows = [
            ("Inode Number:", int(self.view.numbers[row])),
            ("Name:", image_view.quoted(tree.name(row))),
            ("Size:", node["size"]),
            ("Parent:", int(self.view.numbers[int(node["parent"])])),
            ("Mode:", f"0x{int(node['mode']):X}"),
            ("Permissions:", f"{int(node['mode']):o}"),
            ("Nlink:", node["nlink"]),
            ("UID:", node["uid"]),
            ("GID:", node["gid"]),
            ("Mtime:", node["mtime"]),
            ("MtimeNsec:", node["mtime_ns"]),
            ("Blocks:", image_view.blocks_of(self.view, row)),
        ]
        text = "\n" + "".join(f"{label:<19} {value}\n" for label, value in rows)
        if not stat.S_ISREG(int(node["mode"])):
            return text
        text += "  Chunk list:\n"
        start = int(node["chunk"])
        for number, chunk in enumerate(self._all_chunks()[start : start + int(node["chunk_count"])]):
            text += (
                f"        {number} ->\n"
                f"        file offset: {chunk['file_offset']}, chunk index: {chunk['index']}\n"
                f"        compressed size: {chunk['csize']}, decompressed size: {chunk['usize']}\n"
                f"        compressed offset: {chunk['coffset']}, decompressed offset: {chunk['uoffset']}\n"
                f"        blob id: {tree.blobs[int(chunk['blob_index'])].id}\n"
                f"        chunk id: {chunk['digest'].tobytes().hex()}\n"
            )
        return text

    def _all_chunks(self) -> Array:
        """The chunks of the tree, completed from the blobs where they are at hand."""
        if self._chunks is None:
            self._chunks = image_view.complete_chunks(self.image) if self.image else self.tree.chunks
        return self._chunks


def _tables(view: View) -> tuple[tuple[int, int], int]:
    """(offset, size) of the blob table, and the offset of the prefetch table."""
    from nydus.rafs.buffer import Buffer

    buffer = Buffer(view.data, view.path)
    if view.tree.version == 6:
        from nydus.rafs.v6 import layout as v6

        ext = buffer.array(v6.EXT_OFFSET, 1, v6.EXT, "RAFS super block")[0]
        return (int(ext["blob_table_offset"]), int(ext["blob_table_size"])), int(ext["prefetch_offset"])
    from nydus.rafs.v5 import layout as v5

    head = buffer.array(0, 1, v5.SUPER, "RAFS super block")[0]
    return (int(head["blob_table_offset"]), int(head["blob_table_size"])), int(head["prefetch_offset"])


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise NydusError(f"{text!r} is not a number") from None
