"""The layers of the images of one conversion: each taken over from earlier, or converted once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, cast

from nydus.convert.backend import BackendPlace, blobs_of
from nydus.convert.job import Converted, Job
from nydus.convert.options import ConvertOptions
from nydus.convert.progress import LayerProgress, Progress
from nydus.convert.reuse import Known, Record, Tables, known_of, read_back, take_over
from nydus.convert.select import Image
from nydus.convert.target import require_target
from nydus.errors import NydusError
from nydus.oci.model import Descriptor
from nydus.oci.place import RegistryPlace, Sink, SinkPlace, Source, SourcePlace, Store

if TYPE_CHECKING:
    from nydus.convert.workers import Workers
    from nydus.rafs.model import Tree

_AT_ONCE = 8
_AHEAD = 2 * _AT_ONCE


@contextmanager
def readable(place: SinkPlace | BackendPlace, sink: Sink) -> Iterator[Source]:
    """What is written to a place, for reading; ``sink`` is the place, opened for writing."""
    if isinstance(place, BackendPlace):
        with closing(place.open()) as backend:
            yield blobs_of(place, backend)
    else:
        yield cast(Store, sink)


def repository_of(place: SinkPlace | SourcePlace | BackendPlace) -> str:
    """``host/name`` of a registry place, "" for others."""
    return place.reference.name if isinstance(place, RegistryPlace) else ""


@contextmanager
def convert_layers(
    images: Sequence[Image],
    kept: Sequence[LayerProgress],
    source: SourcePlace,
    target: SinkPlace | BackendPlace,
    options: ConvertOptions,
    progress: Progress,
    cached: Mapping[str, Known],
    record: Record | None = None,
    dictionary: Tree | None = None,
    cache: Source | None = None,
    *,
    fork: bool = False,
) -> Iterator[tuple[list[LayerProgress], dict[str, Converted]]]:
    """Has every distinct layer in the target, once the context is left.

    Args:
        kept: layers of other images, with which nothing has to be done.
        cached: source digest -> layer of a build cache.
        record: what was converted before; gets each layer as soon as it is in the target, so that one goes on
            where another was interrupted.
        dictionary: chunks to refer to instead of storing them again.
        cache: where the blobs of ``cached`` are.
        fork: see :class:`~nydus.convert.workers.Workers`.

    Yields:
        How each layer goes, and the converted layers by digest of their source layer.
    """
    distinct: dict[str, tuple[int, Descriptor]] = {}
    for found in images:
        for number, layer in enumerate(found.manifest.layers, 1):
            distinct.setdefault(layer.digest, (number, layer))
    states = [LayerProgress(number, layer.digest, layer.size) for number, layer in distinct.values()]
    by_digest = {state.digest: state for state in states}
    progress.layers([*kept, *states])
    blobs: dict[str, Converted] = {}

    lock = threading.Lock()

    def built(digest: str, converted: Converted) -> None:
        with lock:
            blobs[digest] = converted

    def stored(digest: str) -> None:
        with lock:
            state, converted = by_digest[digest], blobs[digest]
            state.state, state.downloaded, state.reused = "done", state.size, converted.reused
            state.built = state.uploaded = converted.size
            if record is not None:
                record.add(digest, known_of(converted, repository_of(target) or linkable(digest)))
            progress.changed(state)

    def linkable(digest: str) -> str:
        """The repository that has the same blob, of a target that is no repository."""
        known, blob = before[digest], blobs[digest].digest
        return known.repository if known and known.digest == blob else ""

    def reuse(digest: str, converted: Converted) -> None:
        built(digest, converted)
        stored(digest)

    def advance(digest: str, read: int, built: int, sent: int) -> None:
        with lock:
            state = by_digest[digest]
            state.state, state.downloaded, state.built, state.uploaded = "working", read, built, sent
            progress.changed(state)

    def convert(workers: Workers, digests: Sequence[str]) -> None:
        workers.run(
            [Job(*distinct[digest], source, target, options, dictionary) for digest in digests],
            lambda n, *figures: advance(digests[n], *figures),
            lambda n, converted: built(digests[n], converted),
            lambda n: stored(digests[n]),
        )

    before = {digest: cached.get(digest) or (record and record.find(digest)) for digest in distinct}
    known = {digest: layer for digest, layer in before.items() if layer}
    unknown = [digest for digest in distinct if digest not in known]
    stopped = threading.Event()
    with ExitStack() as stack:
        # Before there are threads.
        workers = stack.enter_context(_workers(options, fork=fork)) if unknown else None
        if workers and isinstance(target, BackendPlace):
            require_target(target.open_sink(), target)
        with ThreadPoolExecutor(1, "reuse") as pool:
            taking = pool.submit(_take_over, known, target, cached, cache, reuse, stopped)
            try:
                if workers:
                    convert(workers, unknown)
                taking.result()
            finally:
                stopped.set()
        if lost := [digest for digest in distinct if digest not in blobs]:
            workers = workers or stack.enter_context(_workers(options, fork=fork))
            convert(workers, lost)
        yield [*kept, *states], blobs
        if workers:
            workers.finish()


def _workers(options: ConvertOptions, *, fork: bool) -> Workers:
    from nydus.convert.workers import Workers

    # The clients of object stores and containerd have threads of their own, which a fork of them misses.
    return Workers(options.workers, fork=fork and not {"opendal", "grpc"} & sys.modules.keys())


def _take_over(
    known: Mapping[str, Known],
    target: SinkPlace | BackendPlace,
    cached: Mapping[str, Known],
    cache: Source | None,
    finish: Callable[[str, Converted], None],
    stopped: threading.Event,
) -> None:
    if not known:
        return
    writer, repository = target.open_sink(), repository_of(target)

    def fetch(digest: str) -> Tables | None:
        if stopped.is_set():
            return None
        at = cache if digest in cached else None
        return take_over(known[digest], reader, writer, repository, at, stopped)

    digests = list(known)
    with readable(target, writer) as reader, ThreadPoolExecutor(_AT_ONCE, "reuse") as pool:
        for start in range(0, len(digests), _AHEAD):  # the tables of a layer can be tens of megabytes
            part = digests[start : start + _AHEAD]
            for digest, tables in zip(part, pool.map(fetch, part), strict=True):
                if tables is not None:
                    try:
                        converted = read_back(tables)
                    except NydusError:
                        continue  # it is not as it was recorded: it is converted again
                    finish(digest, converted)
