"""Fuzzing from the command line, and in a process of its own for pytest: see ``scripts/fuzz``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import logging
import os
import random
import resource
import signal
import sys
import time
import traceback
import tracemalloc
import warnings
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.mutate import mutate
from fuzz.targets import TARGETS, Target
from nydus.errors import NydusError

#: A small input that takes longer is a find.
SECONDS = 2.0
#: So is one for which more memory is used than this many times its size, and this much.
MEMORY_FACTOR, MEMORY_BASE = 20, 4 << 20
#: No execution may need more than this at all.
_ADDRESS_SPACE = 3 << 30


class Hang(Exception):
    """An execution that took too long."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hang


def execute(target: Target, data: bytes) -> str:
    """What is wrong with one execution; "" if nothing is."""
    started = time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 5 * SECONDS)  # the machine may be busy with other things
    try:
        target.run(data)
    except NydusError:
        pass
    except Hang:
        return "hangs\n" + traceback.format_exc()
    except Exception:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    spent = time.process_time() - started
    return f"takes {spent:.1f} s" if spent > SECONDS else ""


def memory(target: Target, data: bytes) -> str:
    """The same for the memory that one execution uses."""
    gc.collect()
    tracemalloc.start()
    try:
        target.run(data)
    except NydusError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    limit = MEMORY_FACTOR * len(data) + MEMORY_BASE
    return f"uses {peak} bytes, more than {limit}" if peak > limit else ""


def fuzz(name: str, count: int, seconds: float, seed: int, finds: Path) -> tuple[int, int]:
    """Run mutations number 0, 1, … of a target; returns executions and distinct finds."""
    target = TARGETS[name]
    seeds = target.seeds()
    for good in seeds:
        problem = execute(target, good)
        if problem:
            raise SystemExit(f"{name}: a good input fails: {problem}")
    known: set[str] = set()
    executed = 0
    until = time.monotonic() + seconds
    while executed < count and time.monotonic() < until:
        rng = random.Random(f"{name}:{seed}:{executed}")
        data = mutate(rng.choice(seeds), seeds, rng, text=target.text)
        started = time.process_time()
        problem = execute(target, data)
        # Much memory takes time to fill.
        if not problem and (time.process_time() - started > 0.05 or executed % 25 == 0):
            problem = memory(target, data)
        executed += 1
        if not problem:
            continue
        place = problem.strip().splitlines()[-3:]
        if "\n".join(place) in known:
            continue
        known.add("\n".join(place))
        finds.mkdir(parents=True, exist_ok=True)
        path = finds / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        print(f"FIND {name} seed {seed} number {executed - 1}: {path}\n{problem[-3000:]}", flush=True)
    return executed, len(known)


def with_atheris(name: str, arguments: list[str]) -> None:
    """Let libFuzzer steer: coverage of our modules decides what is mutated further."""
    import atheris  # type: ignore[import-not-found]

    target = TARGETS[name]
    corpus = Path(f"output/fuzz-corpus/{name}")
    corpus.mkdir(parents=True, exist_ok=True)
    for good in target.seeds():
        (corpus / hashlib.sha256(good).hexdigest()[:16]).write_bytes(good)

    def one(data: bytes) -> None:
        with contextlib.suppress(NydusError):
            target.run(data)

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], "-timeout=2", "-rss_limit_mb=2048", *arguments, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the parsers with mutations of good inputs.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} [all]")
    parser.add_argument("--count", type=int, default=1 << 62, help="executions of each target")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each target")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other mutations")
    parser.add_argument(
        "--finds", type=Path, default=Path("output/fuzz-finds"), help="where to keep bad inputs"
    )
    parser.add_argument("--replay", type=Path, help="run one input through the targets instead")
    parser.add_argument("--atheris", action="store_true", help="let libFuzzer steer (one target)")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    unknown = set(names) - set(TARGETS)
    if unknown:
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}")
    if options.atheris:
        with_atheris(names[0], [f"-max_total_time={int(options.seconds)}"])
        return 0
    logging.disable()
    warnings.simplefilter("error", RuntimeWarning)  # numbers that numpy could not represent
    signal.signal(signal.SIGALRM, _alarm)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, resource.RLIM_INFINITY))
    if options.replay:
        data = options.replay.read_bytes()
        problems = {name: execute(TARGETS[name], data) or memory(TARGETS[name], data) for name in names}
        print("\n".join(f"{name}: {problem or 'fine'}" for name, problem in problems.items()))
        return int(any(problems.values()))
    failed = 0
    for name in names:
        started = time.monotonic()
        executed, found = fuzz(name, options.count, options.seconds, options.seed, options.finds)
        failed += found
        print(f"{name}: {executed} executions, {found} finds, {time.monotonic() - started:.1f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(main())
