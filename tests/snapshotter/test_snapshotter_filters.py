"""containerd's filter language."""

from __future__ import annotations

import pytest

from nydus.snapshotter.errors import InvalidArgument
from nydus.snapshotter.filters import compile_filters
from nydus.snapshotter.store import Kind, Snapshot

REF = "containerd.io/snapshot.ref"
CHAIN = "sha256:aaaa"
SNAPSHOTS = [
    Snapshot(1, CHAIN, "", Kind.COMMITTED, 1, 1, {REF: CHAIN, "a.b": "x,y", "empty": ""}, 0, 0),
    Snapshot(2, "sha256:bbbb", CHAIN, Kind.COMMITTED, 1, 1, {REF: "sha256:bbbb"}, 0, 0),
    Snapshot(3, "default/3/busy box", "sha256:bbbb", Kind.ACTIVE, 1, 1, {}, 0, 0),
    Snapshot(4, "view", "sha256:bbbb", Kind.VIEW, 1, 1, {"team": 'quo"te'}, 0, 0),
]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], [1, 2, 3, 4]),
        ([""], [1, 2, 3, 4]),
        ([f'labels."{REF}"=={CHAIN},parent==""'], [1]),
        ([f'labels."{REF}"==sha256:bbbb,parent=="{CHAIN}"'], [2]),
        ([f'labels."{REF}"==sha256:bbbb,parent==""'], []),
        (["kind==active"], [3]),
        (["kind!=committed"], [3, 4]),
        (["kind==view", "kind==active"], [3, 4]),
        ([f'labels."{REF}"'], [1, 2]),
        (["labels.empty"], [1]),
        (["labels.nothing!=x"], [1, 2, 3, 4]),
        (["parent"], [2, 3, 4]),
        (['labels.a.b=="x,y"'], [1]),
        (['labels."a.b"=="x,y"'], [1]),
        (['labels.team=="quo\\"te"'], [4]),
        (['name=="default/3/busy box"'], [3]),
        (["name~=^sha256:"], [1, 2]),
        (["name~=/^def.*box$/"], [3]),
        (["name~=|b{4}|"], [2]),
        (['name~="^vi"'], [4]),
        (["unknown==x"], []),
        (["unknown!=x"], [1, 2, 3, 4]),
    ],
)
def test_matches(filters: list[str], expected: list[int]) -> None:
    matches = compile_filters(filters)
    assert [snapshot.id for snapshot in SNAPSHOTS if matches(snapshot)] == expected


@pytest.mark.parametrize(
    "text", ["==x", "name==a b", "name=", "labels.", "name,", '"open', "1abc", "name~=("]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        compile_filters([text])
