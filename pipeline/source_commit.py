"""Which commit of Bitladder runs, where it runs from a checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def source_commit(root: Path = ROOT) -> str | None:
    """The commit that is checked out; None for an installed package. Changes on top are not seen.

    Read from git's files, not asked of git: a stage must not wait for another program.
    """
    git = root / ".git"
    try:
        if git.is_file():  # of a worktree: it says where its own files are
            git = root / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        return _resolved(git, head.removeprefix("ref:").strip())
    except OSError:
        return None


def _resolved(git: Path, ref: str) -> str | None:
    if (git / "commondir").is_file():
        git = git / (git / "commondir").read_text().strip()
    if (git / ref).is_file():
        return (git / ref).read_text().strip()
    lines = (git / "packed-refs").read_text().splitlines()
    return next((line.split()[0] for line in lines if line.endswith(f" {ref}")), None)
