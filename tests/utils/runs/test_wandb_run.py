"""A run on wandb: its name and its rows; whatever fails there ends no training."""

import sys
from types import SimpleNamespace

import pytest

from utils.runs.wandb_run import Wandb

ROWS = [{"epoch": 0, "mean_recall": 1.0}, {"epoch": 1, "mean_recall": 2.0}]


class Fake:
    """What wandb is asked for; the call named `broken` fails."""

    def __init__(self, broken=None):
        self.broken, self.asked, self.rows = broken, {}, []
        self.Settings = SimpleNamespace

    def init(self, **asked):
        self._may_break("init")
        self.asked = asked
        return self

    def log(self, row, step):
        self._may_break("log")
        self.rows.append((step, row))

    def finish(self):
        self._may_break("finish")
        self.rows.append("finished")

    def _may_break(self, name):
        if name == self.broken:
            raise OSError("no such host")


def send(monkeypatch, folder, fake):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sent = Wandb(folder, {"lr": 1.0})
    for row in ROWS:
        sent.log(row)
    sent.finish()


def test_rows_go_to_the_project_of_the_runs(tmp_path, monkeypatch, capsys):
    """A run that goes on has the same id, and so goes on there."""
    fake = Fake()
    send(monkeypatch, tmp_path / "birds" / "2026-12-01_10-00-00", fake)
    assert fake.asked["project"] == "birds" and fake.asked["id"] == "2026-12-01_10-00-00"
    assert fake.asked["resume"] == "allow" and fake.asked["config"] == {"lr": 1.0}
    assert fake.rows == [(0, ROWS[0]), (1, ROWS[1]), "finished"]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("broken", ["init", "log", "finish", None])
def test_what_fails_there_is_one_line(tmp_path, monkeypatch, capsys, broken):
    send(monkeypatch, tmp_path, Fake(broken) if broken else None)  # None: not installed
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--wandb: the run goes on without it")
    assert ("no such host" if broken else "pip install wandb") in line
