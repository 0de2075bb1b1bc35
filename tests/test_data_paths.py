"""Test the search for files: each real folder once, whatever links there are."""

import glob
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.data.paths import exists, find_files
from jaxgpt.settings import ConfigError


def make_files(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def find(folder, pattern=""):
    return [os.path.relpath(path, folder) for path in find_files(os.path.join(folder, pattern))]


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt", "**/**/*.txt"])
def test_a_link_to_its_own_folder_is_not_followed_again(tmp_path, pattern):
    make_files(tmp_path, ["a.txt", "in/b.txt"])
    for name in ("loop", "again", "in/up"):
        (tmp_path / name).symlink_to(tmp_path, target_is_directory=True)
    assert find(tmp_path, pattern) == ["a.txt", "in/b.txt"]


def test_a_link_to_another_folder_is_followed_once(tmp_path):
    make_files(tmp_path, ["far/c.txt", "data/a.txt"])
    for name in ("one", "two"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "far", target_is_directory=True)
    assert find(tmp_path / "data") == ["a.txt", "one/c.txt"]
    assert find(tmp_path / "data", "**/c.txt") == ["one/c.txt"]
    # Without ** nothing is searched: the paths are those that the pattern names.
    assert find(tmp_path / "data", "*/c.txt") == ["one/c.txt", "two/c.txt"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")
@pytest.mark.parametrize("source", ["/proc", "/proc/**", "/proc/self/*", "/sys"])
def test_a_folder_of_the_system_is_rejected(source):
    with pytest.raises(ConfigError, match="a folder of the operating system"):
        find_files(source)


def test_a_link_into_a_folder_of_the_system_is_rejected(tmp_path):
    (tmp_path / "link").symlink_to("/dev", target_is_directory=True)
    with pytest.raises(ConfigError, match="leads to /dev, a folder of the operating system"):
        find_files(str(tmp_path))


NAMES = ["a.txt", "b.md", "in/a.txt", "in/.h.txt", ".hid/a.txt", "in/deep/c.txt", "x[1]/d.txt"]
PARTS = ["**", "*", "in", "*.txt", "a.txt", "?.*", "d*", "[a-c].*", ".*", "x[[]1]"]


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3))
def test_without_links_a_glob_matches_what_python_matches(tmp_path_factory, parts):
    folder = make_files(tmp_path_factory.mktemp("tree"), NAMES)
    pattern = os.path.join(folder, *parts)
    expected = {path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    if not os.path.isdir(pattern):  # a folder is searched at any depth
        assert set(find_files(pattern)) == expected


def test_relative_paths_and_the_home_folder_are_found(tmp_path, monkeypatch):
    make_files(tmp_path, ["in/a.txt"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("in") == find_files("in/*.txt") == find_files("i*/a.txt") == ["in/a.txt"]
    assert find_files("./in/a.txt") == ["./in/a.txt"]
    assert find_files("~/in") == [str(tmp_path / "in" / "a.txt")]
    assert find_files("~/**/*.txt") == [str(tmp_path / "in" / "a.txt")]
    assert exists("~/in/*.txt")
    assert not exists("~/out/*.txt")
