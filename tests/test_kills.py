import sys

import pytest

import gpt
from kills import kill_runs, outcome


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_at_random_moments_and_resumed(tmp_path):
    assert kill_runs(kills=3, steps=100, seed=1, folder=tmp_path) == 0


@pytest.mark.parametrize("cut", range(8))
def test_a_death_before_any_write_loses_nothing(train, monkeypatch, cut):
    """Two evaluations, four files each. The run dies at one of them and is resumed, or started
    again in another folder if it had not saved its state."""
    _, whole = train("whole")
    write, written = gpt.write, []

    def dying(path, content):
        if len(written) == cut:
            raise RuntimeError("cut")
        written.append(path)
        write(path, content)

    monkeypatch.setattr(gpt, "write", dying)
    with pytest.raises(RuntimeError, match="cut"):
        train("cut")
    monkeypatch.setattr(gpt, "write", write)
    saved = any(path.name == "last.pt" for path in written)
    _, left = train("cut" if saved else "again", resume=saved)
    expected, found = outcome(whole), outcome(left)
    assert [name for name in expected if expected[name] != found[name]] == []
