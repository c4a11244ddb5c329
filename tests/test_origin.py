"""Does a figure say which code and machine made it?"""

import subprocess

import pytest

from nanollm import origin


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit."""

    def git(*words):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return tmp_path


def test_a_commit_has_a_plus_where_the_files_differ_from_it(checkout):
    clean = origin.commit(checkout)
    assert len(clean) == 12 and int(clean, 16)
    (checkout / "code.py").write_text("2\n")
    assert origin.commit(checkout) == f"{clean}+"


def test_an_installed_package_does_not_take_the_commit_of_a_checkout_around_it(checkout):
    inside = checkout / "site-packages"
    inside.mkdir()
    assert origin.commit(inside) is None


def test_without_git_nobody_knows_the_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert origin.commit(checkout) is None


def test_the_hardware_has_a_name_and_cores():
    hardware = origin.hardware()
    assert hardware["processor"] and hardware["cores"] >= 1 and hardware["threads"] >= 1
