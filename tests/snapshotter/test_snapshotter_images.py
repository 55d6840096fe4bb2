"""Mounted images and their daemons, with a stand-in for nydusd."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from nydus.daemon.client import DaemonClient, DaemonError
from nydus.snapshotter import daemons, images
from nydus.snapshotter import labels as label
from nydus.snapshotter.config import load
from nydus.snapshotter.database import Database
from nydus.snapshotter.errors import AlreadyExists, FailedPrecondition, NotFound, SnapshotError, Unavailable
from nydus.snapshotter.images import Images
from nydus.snapshotter.serve import Command
from nydus.snapshotter.snapshotter import Snapshotter
from nydus.snapshotter.store import Kind, Store
from nydus.snapshotter.template import Template

pytestmark = pytest.mark.root
FAKE = Path(__file__).with_name("fake_nydusd.py")


class Node:
    """A snapshotter on a root of its own, and what containerd would ask of it."""

    def __init__(self, root: Path, mode: str, **settings: object) -> None:
        self.root, self.mode, self.settings = root, mode, settings
        self.program = root.parent / "nydusd"
        self.program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        self.program.chmod(0o755)
        self.start()

    def start(self) -> None:
        overrides = {"root": str(self.root), "daemon_mode": self.mode, **self.settings}
        self.config, _ = load(None, overrides)
        self.database = Database(self.root / "metadata.db")
        self.store = Store(self.database, self.root / "snapshots")
        self.images = Images(
            self.config,
            self.database,
            self.store,
            Command(str(self.program)),
            Template(None, self.config.cache_dir),
        )
        self.snapshotter = Snapshotter(self.config, self.store, self.images)

    def stop(self) -> None:
        self.images.close()
        self.database.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def pull(self, name: str, bootstrap: bytes = b"boot", *, reference: str = "127.0.0.1:5/a/b:1") -> None:
        """An image of a data layer and a bootstrap layer, as containerd pulls it into namespace ``name``."""
        common = {label.IMAGE_REF: reference, label.LAYER_DIGEST: "sha256:" + "1" * 64}
        data = f"sha256:{'d' * 64}"
        try:
            self.snapshotter.prepare(f"{name}/1/x", "", {**common, label.TARGET: data, label.BLOB: "true"})
        except AlreadyExists:
            pass
        else:
            pytest.fail("a data layer must be skipped")
        labels = {**common, label.TARGET: f"sha256:{name}", label.BOOTSTRAP: "true"}
        mounts = self.snapshotter.prepare(f"{name}/2/x", data, labels)
        upper = next(o.partition("=")[2] for o in mounts[0].options if o.startswith("upperdir="))
        (Path(upper) / "image").mkdir()
        (Path(upper) / "image" / "image.boot").write_bytes(bootstrap)
        self.snapshotter.commit(f"{name}/meta", f"{name}/2/x", labels)

    def lower(self, key: str) -> Path:
        options = self.snapshotter.mounts(key)[0].options
        return Path(next(o.partition("=")[2] for o in options if o.startswith("lowerdir=")))

    def mounts(self) -> list[Path]:
        return daemons.mounts_below(self.root)

    def keeps(self) -> bool:
        """Whether the descriptors of the first image's daemon are kept for a successor."""
        return ("shared" if self.mode == "shared" else "2") in self.images._keeper

    def serving(self) -> int:
        """How many daemons serve."""
        found = 0
        for path in self.root.glob("socket/*/api.sock"):
            with suppress(DaemonError):
                found += DaemonClient(path).state() == "RUNNING"
        return found

    def daemon_pids(self) -> set[int]:
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if os.fsencode(FAKE) in words and any(os.fsencode(self.root) in word for word in words):
                    found.add(int(entry.name))
        return found


@pytest.fixture(params=["dedicated", "shared"])
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    (tmp_path / "r").mkdir()
    made = Node(tmp_path / "r", request.param)
    yield made
    made.images.close(unmount=True)
    made.database.close()
    assert made.mounts() == []
    assert made.daemon_pids() == set()


def wait_for(condition: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def test_a_container_gets_the_image_as_its_lower_layer(node: Node) -> None:
    node.pull("one")
    made = node.snapshotter.prepare("c1", "one/meta", {})
    assert made[0].type == "overlay"
    keys = [option.partition("=")[0] for option in made[0].options]
    assert keys == ["workdir", "upperdir", "lowerdir"]
    assert (node.lower("c1") / "image.boot").read_bytes() == b"boot"
    assert node.snapshotter.mounts("c1") == made


def test_two_containers_and_two_namespaces_share_one_daemon(node: Node) -> None:
    node.pull("one")
    node.pull("two")
    node.snapshotter.prepare("c1", "one/meta", {})
    node.snapshotter.prepare("c2", "one/meta", {})
    node.snapshotter.prepare("c3", "two/meta", {})
    assert node.lower("c1") == node.lower("c2") == node.lower("c3")
    assert len(node.daemon_pids()) == 1
    # The snapshot it was first mounted for may go while the other lives.
    for key in ("c1", "c2", "one/meta"):
        node.snapshotter.remove(key)
    node.snapshotter.cleanup()
    assert (node.lower("c3") / "image.boot").read_bytes() == b"boot"
    for key in ("c3", "two/meta"):
        node.snapshotter.remove(key)
    node.snapshotter.cleanup()
    assert node.mounts() == []
    assert node.daemon_pids() == set()


def test_the_same_bootstrap_of_another_repository_is_another_image(node: Node) -> None:
    node.pull("one")
    node.pull("two", reference="127.0.0.1:5/other:1")
    node.snapshotter.prepare("c1", "one/meta", {})
    node.snapshotter.prepare("c2", "two/meta", {})
    assert node.lower("c1") != node.lower("c2")


def test_many_at_once_start_one_daemon(node: Node) -> None:
    node.pull("one", b"slow")
    threads = [
        threading.Thread(target=node.snapshotter.prepare, args=(f"c{i}", "one/meta", {})) for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({node.lower(f"c{i}") for i in range(16)}) == 1
    assert len(node.daemon_pids()) == 1


def test_too_many_waiting_calls_are_sent_away(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.images._waiting = threading.BoundedSemaphore(1)
    node.pull("one", b"slow")
    first = threading.Thread(target=node.snapshotter.prepare, args=("c1", "one/meta", {}))
    first.start()
    time.sleep(0.3)
    with pytest.raises(Unavailable):
        node.snapshotter.prepare("c2", "one/meta", {})
    first.join()
    with pytest.raises(NotFound):
        node.snapshotter.stat("c2")


def test_a_slow_daemon_does_not_hold_a_call_for_ever(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "WAIT", 0.1)
    node.pull("one", b"slow")
    with pytest.raises(Unavailable, match="try again"):
        node.snapshotter.prepare("c1", "one/meta", {})
    monkeypatch.setattr(images, "WAIT", 10)
    node.snapshotter.prepare("c1", "one/meta", {})


def test_a_daemon_that_fails_is_quoted_at_once(node: Node) -> None:
    node.pull("one", b"die")
    started = time.monotonic()
    with pytest.raises(SnapshotError, match="this bootstrap cannot be mounted") as caught:
        node.snapshotter.prepare("c1", "one/meta", {})
    assert time.monotonic() - started < 3
    assert caught.value.code == "UNKNOWN"
    with pytest.raises(NotFound):
        node.snapshotter.stat("c1")
    assert [path.name for path in (node.root / "snapshots").iterdir() if path.name == "3"] == []


def test_a_layer_cannot_lead_us_elsewhere(node: Node, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"boot")
    node.pull("one")
    path = node.store.directory(node.store.get("one/meta").id) / "fs" / "image" / "image.boot"
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(NotFound, match="holds no bootstrap"):
        node.snapshotter.prepare("c1", "one/meta", {})


def test_a_pull_without_image_labels_says_what_to_change(node: Node) -> None:
    node.pull("one", reference="")
    with pytest.raises(FailedPrecondition, match="disable_snapshot_annotations"):
        node.snapshotter.prepare("c1", "one/meta", {})


def test_a_view_is_repeated_by_mounts(node: Node) -> None:
    node.pull("one")
    made = node.snapshotter.view("v", "one/meta", {})
    lower = made[0].options[-1].removeprefix("lowerdir=").split(":")
    assert (Path(lower[0]) / "image.boot").exists()
    assert len(lower) == 2, "an overlay without a writable layer needs two"
    assert node.snapshotter.mounts("v") == made
    with pytest.raises(SnapshotError, match="topmost"):
        node.snapshotter.view("w", f"sha256:{'d' * 64}", {})


def test_a_restart_adopts_what_runs(node: Node) -> None:
    node.pull("one")
    node.snapshotter.prepare("c1", "one/meta", {})
    before, pids = node.lower("c1"), node.daemon_pids()
    node.restart()
    node.images.recover()
    assert node.lower("c1") == before
    node.snapshotter.prepare("c2", "one/meta", {})
    assert node.daemon_pids() == pids


def test_the_mode_may_change(node: Node) -> None:
    """What runs goes on as it is; what comes next follows the new mode."""
    node.pull("one")
    node.snapshotter.prepare("c1", "one/meta", {})
    before = node.lower("c1")
    node.mode = {"shared": "dedicated", "dedicated": "shared"}[node.mode]
    node.restart()
    node.images.recover()
    node.pull("two", b"another")
    node.snapshotter.prepare("c2", "two/meta", {})
    assert node.lower("c1") == before
    assert (node.lower("c2") / "image.boot").read_bytes() == b"another"
    assert len(node.daemon_pids()) == 2
    assert {path.parent.name == "shared" for path in (before, node.lower("c2"))} == {True, False}


def test_a_killed_daemon_has_a_successor(node: Node) -> None:
    """It takes over the mounts, so that running containers go on; nothing is mounted anew."""
    node.pull("one")
    node.pull("two", b"other")
    node.snapshotter.prepare("c1", "one/meta", {})
    node.snapshotter.prepare("c2", "two/meta", {})
    for _ in range(3):
        before, devices = node.daemon_pids(), {path: path.stat().st_dev for path in node.mounts()}
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: node.serving() == len(before))  # noqa: B023
        assert {path: path.stat().st_dev for path in node.mounts()} == devices
    # It is a daemon like the first one.
    for key in ("c1", "one/meta"):
        node.snapshotter.remove(key)
    node.snapshotter.cleanup()
    assert (node.lower("c2") / "image.boot").read_bytes() == b"other"
    for key in ("c2", "two/meta"):
        node.snapshotter.remove(key)
    node.snapshotter.cleanup()
    assert (node.mounts(), node.daemon_pids()) == ([], set())
    assert list((node.root / "supervisor").iterdir()) == []


def test_an_image_that_comes_while_a_daemon_makes_way_for_its_successor(node: Node) -> None:
    node.pull("one")
    node.pull("two", b"other")
    node.snapshotter.prepare("c1", "one/meta", {})
    device, (before,) = node.lower("c1").stat().st_dev, node.daemon_pids()
    (client,) = (DaemonClient(path) for path in node.root.glob("socket/*/api.sock"))
    client.exit()
    assert client.state() == "STOPPED"
    node.snapshotter.prepare("c2", "two/meta", {})
    wait_for(lambda: before not in node.daemon_pids() and node.serving() == 1 + (node.mode != "shared"))
    assert node.lower("c1").stat().st_dev == device
    assert (node.lower("c2") / "image.boot").read_bytes() == b"other"


def test_an_adopted_daemon_has_a_successor_too(node: Node) -> None:
    node.pull("one")
    node.snapshotter.prepare("c1", "one/meta", {})
    (device,) = {path.stat().st_dev for path in node.mounts() if (path / "image.boot").exists()}
    node.restart()
    node.images.recover()
    (before,) = node.daemon_pids()
    wait_for(node.keeps)
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: node.daemon_pids() - {before})
    assert node.lower("c1").stat().st_dev == device


def test_who_cannot_be_replaced_keeps_nobody_waiting(node: Node) -> None:
    node.pull("one")
    node.snapshotter.prepare("c1", "one/meta", {})
    (pid,) = node.daemon_pids()
    node.program.write_text("#!/bin/sh\nexit 1\n")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not node.keeps())
    assert node.mounts() == []


def test_a_daemon_that_is_ended_has_no_successor(node: Node) -> None:
    """By its administrator, or because its mount was taken away."""
    node.pull("one")
    node.snapshotter.prepare("c1", "one/meta", {})
    (pid,) = node.daemon_pids()
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not node.keeps())
    assert node.daemon_pids() == set()
    node.snapshotter.prepare("c2", "one/meta", {})
    assert (node.lower("c1") / "image.boot").exists()


@pytest.mark.parametrize("policy", ["none", "restart"])
def test_other_policies_keep_nothing(tmp_path: Path, policy: str) -> None:
    (tmp_path / "r").mkdir()
    node = Node(tmp_path / "r", "dedicated", **{"daemon.recover_policy": policy})
    try:
        node.pull("one")
        node.snapshotter.prepare("c1", "one/meta", {})
        assert not node.keeps()
        (pid,) = node.daemon_pids()
        (node.lower("c1") / "old").touch()
        os.kill(pid, signal.SIGKILL)
        if policy == "restart":
            wait_for(lambda: node.serving() == 1)
            assert not (node.lower("c1") / "old").exists(), "mounted anew"
        else:
            time.sleep(0.5)
            assert node.daemon_pids() == set()
    finally:
        node.images.close(unmount=True)
        node.database.close()
    assert node.mounts() == []


def test_a_dead_daemon_comes_back(node: Node) -> None:
    node.pull("one")
    node.snapshotter.prepare("c1", "one/meta", {})
    (pid,) = node.daemon_pids()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: node.daemon_pids() - {pid})
    wait_for(lambda: (node.lower("c1") / "image.boot").exists())
    node.snapshotter.prepare("c2", "one/meta", {})
    assert len(node.daemon_pids()) == 1


def test_a_daemon_that_died_unwatched_comes_back(node: Node) -> None:
    node.pull("one")
    node.snapshotter.prepare("c1", "one/meta", {})
    node.stop()
    (pid,) = node.daemon_pids()
    os.kill(pid, signal.SIGKILL)
    node.start()
    node.images.recover()
    wait_for(lambda: node.daemon_pids() - {pid})
    assert (node.lower("c1") / "image.boot").exists()


def test_after_a_reboot_nothing_starts_until_it_is_asked_for(node: Node) -> None:
    node.pull("one")
    node.snapshotter.prepare("c1", "one/meta", {})
    node.stop()
    for pid in node.daemon_pids():
        os.kill(pid, signal.SIGKILL)
    daemons.detach(node.root)
    node.start()
    node.images.recover()
    time.sleep(0.3)
    assert node.daemon_pids() == set()
    assert (node.lower("c1") / "image.boot").exists()


def test_removing_everything_leaves_nothing(node: Node) -> None:
    node.pull("one")
    node.snapshotter.prepare("c1", "one/meta", {})
    for key in ("c1", "one/meta", f"sha256:{'d' * 64}"):
        node.snapshotter.remove(key)
    (node.config.cache_dir / ("a" * 64 + ".blob.data")).touch()
    (node.config.cache_dir / "somebody's notes").touch()
    node.snapshotter.cleanup()
    assert node.mounts() == []
    files = {str(path.relative_to(node.root)) for path in node.root.rglob("*") if not path.is_dir()}
    assert {name for name in files if not name.startswith("metadata.db")} == {"cache/somebody's notes"}
    assert list((node.root / "snapshots").iterdir()) == []
    for name in ("mnt", "socket", "config", "logs"):
        assert list((node.root / name).rglob("*")) == [], name


def test_an_image_that_comes_as_the_last_one_goes_keeps_the_daemon(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.pull("one")
    node.snapshotter.prepare("c1", "one/meta", {})
    daemon = images.SHARED if node.mode == "shared" else "2"
    locked, came = node.images._locked, list[str]()
    lower: list[Path] = []

    def meanwhile(key: str) -> AbstractContextManager[None]:
        if key == daemon and not came:
            came.append(key)
            node.pull("two", b"other")
            node.snapshotter.prepare("c2", "two/meta", {})
            lower.append(node.lower("c2"))
        return locked(key)

    node.snapshotter.remove("c1")
    node.snapshotter.remove("one/meta")
    monkeypatch.setattr(node.images, "_locked", meanwhile)
    node.snapshotter.cleanup()
    # Not asked for again, which would mount it anew.
    assert (lower[0] / "image.boot").read_bytes() == b"other"
    assert len(node.mounts()) == 1 + (node.mode == "shared")


def test_what_an_earlier_run_left_is_not_ended_under_a_new_image(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = images.SHARED if node.mode == "shared" else "2"
    node.pull("one")
    (node.root / "mnt" / name).mkdir(parents=True)
    end, locks, coming = node.images._end, node.images._locked._locks, list[Future[object]]()
    executor, ended = ThreadPoolExecutor(1), threading.Event()

    def meanwhile(name: str) -> None:
        if not coming:
            coming.append(executor.submit(node.snapshotter.prepare, "c1", "one/meta", {}))
            wait_for(lambda: coming[0].done() or (name in locks and locks[name][1] > 1))
        end(name)
        ended.set()

    monkeypatch.setattr(node.images, "_end", meanwhile)
    node.images.recover()
    assert ended.wait(20)
    executor.shutdown()
    assert coming[0].exception() is None
    assert node.serving() == 1


def test_how_a_program_ended_is_known_whoever_starts_the_next(tmp_path: Path) -> None:
    command = Command("/bin/false")
    first = command.spawn([])
    time.sleep(0.2)
    second = command.spawn([])
    assert command.exit_status(first) == 1
    wait_for(lambda: command.exit_status(second) == 1)


def test_usage_of_a_data_layer_counts_its_cache(node: Node) -> None:
    node.pull("one")
    name = f"sha256:{'d' * 64}"
    before = node.snapshotter.usage(name)
    (node.config.cache_dir / ("1" * 64 + ".blob.data")).write_bytes(bytes(100_000))
    size, inodes = node.snapshotter.usage(name)
    assert size - before[0] >= 100_000
    assert inodes == before[1] + 1


@pytest.mark.vectors
def test_cached_blobs_stay_while_an_image_needs_them(node: Node, vectors: Path) -> None:
    bootstrap = (vectors / "v6-dir-zstd" / "bootstrap").read_bytes()
    node.pull("one", bootstrap)
    (blob,) = [path.name for path in (vectors / "v6-dir-zstd" / "blobs").iterdir()]
    cached = node.config.cache_dir / f"{blob}.blob.data"
    cached.touch()
    other = node.config.cache_dir / ("b" * 64 + ".blob.data")
    other.touch()
    node.pull("broken", b"no bootstrap at all")
    node.snapshotter.cleanup()
    assert cached.exists(), "pulled, not mounted"
    assert not other.exists(), "an image that cannot be mounted keeps nothing and hinders nothing"
    node.snapshotter.remove("one/meta")
    node.settings["cache_manager.gc_period"] = "1h"
    node.restart()
    node.snapshotter.cleanup()
    assert cached.exists(), "its period has not passed"
    node.settings["cache_manager.gc_period"] = "0s"
    node.restart()
    node.snapshotter.cleanup()
    assert not cached.exists()


def test_overlay_for_virtual_machines_carries_no_secrets(tmp_path: Path) -> None:
    import base64
    import json

    (tmp_path / "r").mkdir()
    node = Node(tmp_path / "r", "dedicated", **{"snapshot.enable_nydus_overlayfs": True})
    try:
        node.pull("one")
        made = node.snapshotter.prepare("c1", "one/meta", {label.VOLATILE: ""})
        assert made[0].type == "fuse.nydus-overlayfs"
        assert "volatile" in made[0].options
        extra = next(o.removeprefix("extraoption=") for o in made[0].options if o.startswith("extraoption="))
        value = json.loads(base64.b64decode(extra))
        assert set(value) == {"source", "config", "snapshotdir", "fs_version"}
        assert "auth" not in value["config"]
    finally:
        node.images.close(unmount=True)
        node.database.close()


def test_layers_of_ordinary_images(node: Node) -> None:
    made = node.snapshotter.prepare("a", "", {})
    assert made == [("bind", str(node.store.directory(1) / "fs"), ["rw", "rbind"])]
    node.snapshotter.commit("A", "a", {})
    assert node.snapshotter.view("v", "A", {}) == [
        ("bind", str(node.store.directory(1) / "fs"), ["ro", "rbind"])
    ]
    node.snapshotter.prepare("b", "A", {})
    node.snapshotter.commit("B", "b", {})
    made = node.snapshotter.prepare(
        "c", "B", {label.UID_MAPPING: "0:1000:10", label.GID_MAPPING: "0:1000:10"}
    )
    directory = node.store.directory(node.store.get("c").id)
    lower = ":".join(str(node.store.directory(node.store.get(name).id) / "fs") for name in "BA")
    assert made == [
        (
            "overlay",
            "overlay",
            [
                f"workdir={directory}/work",
                f"upperdir={directory}/fs",
                "uidmap=0:1000:10",
                "gidmap=0:1000:10",
                f"lowerdir={lower}",
            ],
        )
    ]
    assert (directory / "fs").stat().st_uid == 1000
    with pytest.raises(FailedPrecondition):
        node.snapshotter.mounts("A")
    assert node.store.get("A").kind == Kind.COMMITTED
