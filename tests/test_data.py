import hashlib
import io
import urllib.error

import pytest
import torch

import gpt
from conftest import ROOT


def test_round_trip():
    text = (ROOT / gpt.BUNDLED).read_text(encoding="utf-8")
    tokenizer = gpt.CharTokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bundled_play_has_the_form_of_tiny_shakespeare():
    raw = (ROOT / gpt.BUNDLED).read_bytes()
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert set(raw.decode("ascii")) == set("\n !$&',-.3:;?" + letters + letters.lower())
    assert len(raw) >= 60_000
    speeches = raw.decode().lower().strip().split("\n\n")
    assert len(speeches) == len(set(speeches)) > 400


def test_unknown_characters_are_named():
    with pytest.raises(gpt.UserError, match="'x' 'é'"):
        gpt.CharTokenizer("abc").encode("axébc")


def test_split_is_disjoint_and_complete(text_file):
    tokenizer, train, val = gpt.load_text(text_file)
    assert (len(train), len(val)) == (3600, 400)
    assert tokenizer.decode(train) + tokenizer.decode(val) == text_file.read_text(encoding="utf-8")


@pytest.mark.parametrize("raw", ["a\nb", "\ufeffa\nb", "a\r\nb"])
def test_byte_order_mark_and_line_ends(tmp_path, raw):
    path = tmp_path / "text.txt"
    path.write_bytes(raw.encode())
    tokenizer, train, val = gpt.load_text(path)
    assert tokenizer.decode(torch.cat((train, val))) == "a\nb"


def test_batch_is_fixed_by_step_and_seed_and_shifted_by_one():
    data = torch.arange(100, dtype=torch.int32)
    x, y = gpt.get_batch(data, 8, 16, step=3, seed=1)
    assert x.shape == y.shape == (8, 16)
    assert torch.equal(y, x + 1)
    assert torch.equal(x, gpt.get_batch(data, 8, 16, step=3, seed=1)[0])
    assert not torch.equal(x, gpt.get_batch(data, 8, 16, step=4, seed=1)[0])
    assert not torch.equal(x, gpt.get_batch(data, 8, 16, step=3, seed=2)[0])


def test_batch_reaches_both_ends():
    data = torch.arange(20)
    starts = {int(gpt.get_batch(data, 1, 16, step)[0][0, 0]) for step in range(200)}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("seed, begin", [(0, 0), (7, 0), (2**31 - 1, 10**6)])
@pytest.mark.parametrize("steps, B, T", [(200, 1, 64), (157, 4, 64), (40, 32, 16)])
def test_batches_read_the_text_evenly(seed, begin, steps, B, T):
    """However long: everywhere but at the ends within two of the mean number of times."""
    data = torch.arange(4000)
    windows = [gpt.get_batch(data, B, T, begin + i, seed)[0] for i in range(steps)]
    times = torch.cat(windows).flatten().bincount(minlength=len(data))
    assert (times[T:-T] - steps * B * T / len(data)).abs().max() < 2


def serve(monkeypatch, content):
    """Make urlopen answer with content, or raise it."""
    def urlopen(url, timeout):
        if isinstance(content, Exception):
            raise content
        return io.BytesIO(content)
    monkeypatch.setattr(gpt.urllib.request, "urlopen", urlopen)


def test_download_is_checked_and_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(b"text").hexdigest())
    serve(monkeypatch, b"text")
    assert gpt.find_text() == gpt.TEXT
    assert gpt.TEXT.read_bytes() == b"text"


def test_wrong_download_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    serve(monkeypatch, b"<html>sign in</html>")
    with pytest.raises(gpt.UserError, match="SHA-256"):
        gpt.find_text()
    assert not gpt.TEXT.exists()


def test_without_network_the_bundled_play(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, "LOG", gpt.sys.stderr)
    serve(monkeypatch, urllib.error.URLError("no route"))
    with pytest.raises(gpt.UserError, match=r"save .* as .*--data"):
        gpt.find_text()
    gpt.write(gpt.BUNDLED, b"play")
    assert gpt.find_text() == gpt.BUNDLED
    assert "instead" in capsys.readouterr().err


def test_a_changed_text_is_not_mistaken_for_tiny_shakespeare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gpt.write(gpt.TEXT, b"something else")
    with pytest.raises(gpt.UserError, match="SHA-256"):
        gpt.find_text()
    assert gpt.TEXT.read_bytes() == b"something else"
