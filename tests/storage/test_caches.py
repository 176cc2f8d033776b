"""Caches of a user with a home, without one, and with one that cannot be written."""

import os
from pathlib import Path

import pytest

from fastddpm.storage import caches
from fastddpm.storage.caches import library_caches, user_cache

SETTINGS = ("TRITON_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in (*SETTINGS, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HOME": "/home/me"}, "/home/me/.cache/fastddpm/fid"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/caches"}, "/caches/fastddpm/fid"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": ""}, "/home/me/.cache/fastddpm/fid"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "here"}, None),  # the XDG standard wants an absolute path
    ],
)
def test_cache_of_a_user(environment, folder, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert user_cache("fid") == (folder and Path(folder))


def test_a_user_without_a_name_and_a_home_has_no_cache(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is for such a user
    assert user_cache("fid") is None


def test_libraries_keep_their_caches_in_a_home_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    with library_caches():
        assert dict(os.environ) == before


@pytest.mark.parametrize("home", ["missing", "~"])
def test_libraries_get_a_temporary_folder(home, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: home if home == "~" else str(tmp_path / home))
    before = dict(os.environ)
    with library_caches():
        folders = {Path(os.environ[name]).parent for name in SETTINGS}
        [folder] = folders
        assert folder.stat().st_mode & 0o777 == 0o700  # others must not put compiled code there
    assert dict(os.environ) == before
    assert not folder.exists()


def test_libraries_keep_settings_and_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with library_caches():
        assert os.environ["TRITON_CACHE_DIR"] == "/mine"
        assert "HF_HOME" not in os.environ
        assert Path(os.environ["MPLCONFIGDIR"]).name == "matplotlib"


def test_without_a_temporary_folder_the_work_goes_on(monkeypatch):
    def full(**_):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(caches.tempfile, "mkdtemp", full)
    with library_caches():
        assert not set(SETTINGS) & set(os.environ)
