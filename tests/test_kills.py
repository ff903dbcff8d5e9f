import sys

import pytest

import gpt
from kills import kill_runs, outcome


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_at_random_moments_and_resumed(tmp_path):
    assert kill_runs(3, 100, 5, tmp_path, ["dropout"]) == 0


def test_a_death_before_any_write_loses_nothing(train, monkeypatch):
    """The run dies before each of its files takes its place, and is resumed, or started again if
    it had not saved its state."""
    replace, written = gpt.os.replace, []
    monkeypatch.setattr(gpt.os, "replace", lambda *paths: written.append(paths) or replace(*paths))
    run, whole = train("whole", dropout=0.2)
    assert run["metrics"][1]["val_loss"] < run["metrics"][0]["val_loss"]  # so the best is the last
    expected, writes = outcome(whole), len(written)
    assert writes == 3 + 4 + 4

    def dying(*paths):
        if len(written) == cut:
            raise RuntimeError("cut")
        written.append(paths)
        replace(*paths)

    for cut in range(writes):
        written.clear()
        monkeypatch.setattr(gpt.os, "replace", dying)
        with pytest.raises(RuntimeError, match="cut"):
            train(f"cut-{cut}", dropout=0.2)
        monkeypatch.setattr(gpt.os, "replace", replace)
        saved = (train.folder / f"cut-{cut}/last.pt").exists()
        found = outcome(train(f"cut-{cut}", resume=saved, **({} if saved else {"dropout": 0.2}))[1])
        assert [name for name in expected if expected[name] != found[name]] == [], cut
