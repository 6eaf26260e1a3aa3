"""Environment variables: typed, and a bad or unknown one is an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemel.config.env import read
from gemel.config.errors import ConfigError


def test_cache_is_gemels_own_then_xdgs_then_the_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read({}).cache == tmp_path / ".cache" / "gemel"
    assert read({"XDG_CACHE_HOME": "/x"}).cache == Path("/x/gemel")
    assert read({"XDG_CACHE_HOME": "/x", "GEMEL_CACHE": "/y"}).cache == Path("/y")
    assert read({"GEMEL_CACHE": "~/models"}).cache == tmp_path / "models"


def test_relative_xdg_path_is_ignored_as_its_specification_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read({"XDG_CACHE_HOME": "x"}).cache == tmp_path / ".cache" / "gemel"


@pytest.mark.parametrize("name", ["GEMEL_CACHE", "GEMEL_TEST_MODEL"])
def test_relative_path_is_refused_and_the_way_out_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match=rf"{name} = 'here' is not an absolute path; for the current folder use {name}=\$PWD/here"):
        read({name: "here"})
    read({name: f"{tmp_path}/here"})


def test_cache_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        read({"GEMEL_CACHE": str(tmp_path / "file")})


def test_missing_test_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read({"GEMEL_TEST_MODEL": str(tmp_path / "absent")})
    assert read({"GEMEL_TEST_MODEL": str(tmp_path)}).test_model == tmp_path


@pytest.mark.parametrize("key", ["", "  ", " key"])
def test_blank_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="GEMEL_API_KEY"):
        read({"GEMEL_API_KEY": key})


def test_misspelt_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="GEMEL_CASHE is not known: did you mean GEMEL_CACHE"):
        read({"GEMEL_CASHE": "/x"})
    assert read({"CASHE": "/x", "GEMEL": "y"}).api_key is None
