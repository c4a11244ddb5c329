"""A file or folder is there whole, or it is the old one."""

import errno
import os

import pytest

from nanollm.durable import lock_folder, new_folder, sha256_of, write_file, write_json


def test_a_file_is_replaced_and_leaves_nothing_beside_it(tmp_path):
    write_file(tmp_path / "a", b"one")
    write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_equal_values_give_equal_json_bytes(tmp_path):
    for name in ("a", "b"):
        write_json(tmp_path / name, {"x": [1, 2.5], "y": "ü"})
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")


def test_a_folder_that_was_not_finished_does_not_replace_the_old_one(tmp_path):
    with new_folder(tmp_path / "f") as draft:
        (draft / "a").write_text("old")
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "f") as draft:
        (draft / "a").write_text("new")
        raise OSError("disk full")
    assert (tmp_path / "f" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    for content in ("old", "new"):
        with new_folder(tmp_path / "f") as draft:
            (draft / content).write_text(content)
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_folder_lost_between_two_renames_comes_back(tmp_path):
    """Killed after the old folder was moved aside: the next writer finds it again, whatever becomes of its own."""
    (tmp_path / "f.old").mkdir()
    (tmp_path / "f.old" / "a").write_text("old")
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "f"):
        raise OSError("disk full")
    assert (tmp_path / "f" / "a").read_text() == "old"


def test_one_process_at_a_time_holds_a_folder(tmp_path):
    with (
        lock_folder(tmp_path / "f"),
        pytest.raises(ValueError, match="is in use by another process"),
        lock_folder(tmp_path / "f"),
    ):
        pass
    with lock_folder(tmp_path / "f"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows locks in another way")
def test_a_file_system_without_locks_is_named_and_not_taken_for_a_busy_folder(tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(OSError, match=r"this file system cannot lock files \(No locks available\)"),
        lock_folder(tmp_path),
    ):
        pass
