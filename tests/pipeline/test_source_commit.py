import subprocess

import pytest
from bitladder.pipeline.source_commit import source_commit


@pytest.fixture
def git(tmp_path):
    def run(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    run("init", "-q")
    run("commit", "-q", "--allow-empty", "-m", "first")
    return run


def test_the_commit_is_what_git_says(git, tmp_path):
    assert source_commit(tmp_path) == git("rev-parse", "HEAD")


def test_packed_detached_and_in_a_worktree_too(git, tmp_path):
    commit = git("rev-parse", "HEAD")
    git("pack-refs", "--all")
    assert source_commit(tmp_path) == commit
    git("worktree", "add", "-q", "-b", "other", "beside")
    assert source_commit(tmp_path / "beside") == commit
    git("checkout", "-q", "--detach")
    assert source_commit(tmp_path) == commit


def test_what_is_not_a_checkout_has_none(tmp_path):
    assert source_commit(tmp_path) is None
