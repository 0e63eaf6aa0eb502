"""Commands, as they are typed."""

import sys

import pytest
from bitladder.flows.__main__ import main


@pytest.fixture
def bitladder(monkeypatch, capsys):
    """Runs a command; gives back its exit code, standard output and standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["bitladder", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call
