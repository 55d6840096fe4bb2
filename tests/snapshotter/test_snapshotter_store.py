"""The snapshot records and their directories."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nydus.errors import NydusError
from nydus.snapshotter.database import Database, RootLock
from nydus.snapshotter.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from nydus.snapshotter.store import Kind, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Database(tmp_path / "metadata.db"), tmp_path / "snapshots")


def test_a_snapshot_lives_from_active_to_committed(store: Store) -> None:
    made = store.create(Kind.ACTIVE, "work", "", {"a": "1"})
    directory = store.directory(made.id)
    assert (directory / "fs").stat().st_mode & 0o777 == 0o755
    assert (directory / "work").stat().st_mode & 0o777 == 0o711
    store.commit("layer", "work", {"b": "2"}, 4096, 2)
    got = store.get("layer")
    assert (got.id, got.kind, got.labels, got.size, got.inodes) == (
        made.id,
        Kind.COMMITTED,
        {"b": "2"},
        4096,
        2,
    )
    assert got.updated > got.created
    with pytest.raises(NotFound):
        store.get("work")


def test_the_chain_is_nearest_first(store: Store) -> None:
    store.create(Kind.COMMITTED, "a", "", {})
    store.create(Kind.COMMITTED, "b", "a", {})
    store.create(Kind.VIEW, "c", "b", {})
    assert [snapshot.name for snapshot in store.chain("c")] == ["c", "b", "a"]
    assert [snapshot.parent for snapshot in store.chain("c")] == ["b", "a", ""]
    assert not (store.directory(store.get("c").id) / "work").exists()


def test_refusals(store: Store) -> None:
    store.create(Kind.ACTIVE, "active", "", {})
    store.create(Kind.COMMITTED, "base", "", {})
    store.create(Kind.VIEW, "view", "base", {})
    with pytest.raises(AlreadyExists):
        store.create(Kind.ACTIVE, "active", "", {})
    with pytest.raises(NotFound):
        store.create(Kind.ACTIVE, "x", "nobody", {})
    with pytest.raises(InvalidArgument):
        store.create(Kind.ACTIVE, "x", "active", {})
    with pytest.raises(AlreadyExists):
        store.commit("base", "active", {}, 0, 0)
    with pytest.raises(FailedPrecondition):
        store.commit("y", "view", {}, 0, 0)
    with pytest.raises(NotFound):
        store.commit("y", "nobody", {}, 0, 0)
    with pytest.raises(FailedPrecondition):
        store.remove("base")
    with pytest.raises(NotFound):
        store.remove("nobody")
    with pytest.raises(InvalidArgument):
        store.update("base", {}, ["parent"])


def test_a_refused_create_leaves_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        store.create(Kind.ACTIVE, "x", "nobody", {})
    assert list((tmp_path / "snapshots").iterdir()) == []
    assert store.all() == []


def test_ids_are_never_reused(store: Store) -> None:
    first = store.create(Kind.ACTIVE, "a", "", {}).id
    store.remove("a")
    assert store.create(Kind.ACTIVE, "a", "", {}).id > first


def test_a_directory_left_by_a_crash_is_replaced(store: Store, tmp_path: Path) -> None:
    stale = tmp_path / "snapshots" / "1"
    (stale / "fs").mkdir(parents=True)
    (stale / "fs" / "old").touch()
    made = store.create(Kind.ACTIVE, "a", "", {})
    assert made.id == 1
    assert list((stale / "fs").iterdir()) == []


def test_update_changes_what_the_mask_names(store: Store) -> None:
    store.create(Kind.COMMITTED, "a", "", {"x": "1", "y.z": "2", "keep": "3"})
    assert store.update("a", {"x": "9"}, ["labels.x", "labels.y.z"]).labels == {"x": "9", "keep": "3"}
    assert store.update("a", {"n": "1"}, []).labels == {"n": "1"}
    assert store.update("a", {"m": "1"}, ["labels"]).labels == {"m": "1"}


def test_sweep_finds_what_has_no_record(store: Store, tmp_path: Path) -> None:
    store.create(Kind.COMMITTED, "a", "", {})
    gone = store.create(Kind.COMMITTED, "b", "", {})
    store.remove("b")
    (tmp_path / "snapshots" / "new-77").mkdir()
    names = {path.name for path in store.sweep()}
    assert names == {f"rm-{gone.id}", "rm-new-77"}
    assert {path.name for path in store.sweep()} == names, "until they are deleted"


def test_the_owner_of_fs_follows_the_parent(store: Store) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    store.create(Kind.COMMITTED, "a", "", {}, (7, 8))
    child = store.create(Kind.ACTIVE, "b", "a", {})
    status = (store.directory(child.id) / "fs").stat()
    assert (status.st_uid, status.st_gid) == (7, 8)


@pytest.mark.root
def test_a_full_disk_leaves_no_half_of_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=40", "small", str(tmp_path / "small")]
    subprocess.run(command, check=True)
    try:
        store = Store(Database(tmp_path / "m.db"), tmp_path / "small" / "s")
        with pytest.raises(OSError, match="No space left"):
            for number in range(40):
                store.create(Kind.ACTIVE, str(number), "", {})
        directories = {path.name for path in (tmp_path / "small" / "s").iterdir()}
        assert directories == {str(snapshot.id) for snapshot in store.all()}
        last = store.all()[-1]
        store.remove(last.name)
        for path in store.sweep():
            shutil.rmtree(path)
        assert store.create(Kind.COMMITTED, "fits", "", {}).id > last.id
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(NydusError, match=r"m\.db: cannot use the database"):
        Database(tmp_path / "m.db")


def test_records_survive_a_kill(tmp_path: Path) -> None:
    program = f"""
import os
from pathlib import Path
from nydus.snapshotter.database import Database
from nydus.snapshotter.store import Kind, Store
root = Path({str(tmp_path)!r})
store = Store(Database(root / "m.db"), root / "s")
for i in range(3):
    store.create(Kind.COMMITTED, str(i), "", {{}})
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    store = Store(Database(tmp_path / "m.db"), tmp_path / "s")
    assert [snapshot.name for snapshot in store.all()] == ["0", "1", "2"]
    assert store.sweep() == []


def test_the_root_is_locked_and_says_by_whom(tmp_path: Path) -> None:
    lock = RootLock(tmp_path)
    program = f"""
from pathlib import Path
from nydus.snapshotter.database import RootLock
RootLock(Path({str(tmp_path)!r}))
"""
    refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"in use by containerd-nydus-grpc, pid {os.getpid()}" in refused.stderr
    lock.close()
    RootLock(tmp_path).close()
