import hashlib

import pytest
import torch

import gpt
from conftest import PLAY


def read(path):
    """Text, training ids, validation ids of a file, back in one text."""
    _, chars, train, val, _ = gpt.load_text(path)
    return "".join(chars[i] for i in torch.cat((train, val)))


def test_round_trip():
    text = PLAY.read_text(encoding="utf-8")
    chars = "".join(sorted(set(text)))
    ids = gpt.encode(text, chars)
    assert ids.dtype == torch.int64 and "".join(chars[i] for i in ids) == text


def test_bundled_play_has_the_form_of_tiny_shakespeare():
    raw = PLAY.read_bytes()
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert set(raw.decode("ascii")) == set("\n !$&',-.3:;?" + letters + letters.lower())
    assert len(raw) >= 60_000
    speeches = raw.decode().lower().strip().split("\n\n")
    assert len(speeches) == len(set(speeches)) > 400


def test_split_is_disjoint_and_complete(text_file):
    text = text_file.read_text(encoding="utf-8")
    path, chars, train, val, sha256 = gpt.load_text(str(text_file))
    assert (path, chars) == (text_file, "".join(sorted(set(text))))
    assert (len(train), len(val)) == (3600, 400)
    assert read(text_file) == text
    assert sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_at_most_200_000_characters_are_kept_to_validate_on(tmp_path):
    for tens, kept in ((199_999, 199_999), (210_000, 200_000)):
        (tmp_path / "long.txt").write_text("0123456789" * tens, encoding="utf-8")
        _, _, train, val, _ = gpt.load_text(tmp_path / "long.txt")
        assert (len(train), len(val)) == (10 * tens - kept, kept)


@pytest.mark.parametrize("raw", [b"", b"\xef\xbb\xbf", b"aaaa", b"text\0"],
                         ids=["empty", "only a mark", "one character", "binary"])
def test_a_file_that_holds_no_text_is_refused(tmp_path, raw):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"text\.txt is empty, binary, or of one character"):
        gpt.load_text(path)


def test_batch_is_fixed_by_step_and_seed_and_shifted_by_one():
    data = torch.arange(100)
    x, y = gpt.get_batch(data, 8, 16, step=3, seed=1)
    assert x.shape == y.shape == (8, 16)
    assert torch.equal(x, x[:, :1] + torch.arange(16)) and torch.equal(y, x + 1)
    assert torch.equal(x, gpt.get_batch(data, 8, 16, step=3, seed=1)[0])
    assert not torch.equal(x, gpt.get_batch(data, 8, 16, step=4, seed=1)[0])
    assert not torch.equal(x, gpt.get_batch(data, 8, 16, step=3, seed=2)[0])


def test_batch_reaches_both_ends():
    data = torch.arange(20)
    starts = {int(gpt.get_batch(data, 1, 16, step)[0][0, 0]) for step in range(200)}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_all_processes_are_the_whole_batch(monkeypatch, world):
    data = torch.arange(1000)
    whole = gpt.get_batch(data, 8, 16, 5)
    monkeypatch.setattr(gpt, "WORLD", world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(gpt, "RANK", rank)
        shares.append(gpt.get_batch(data, 8, 16, 5))
    assert all(8 // world <= len(x) <= -(-8 // world) for x, y in shares)
    for parts, expected in zip(zip(*shares), whole):
        together = torch.cat(parts)
        assert torch.equal(together[together[:, 0].argsort()], expected)


@pytest.mark.parametrize("seed, begin", [(0, 0), (7, 0), (2**31 - 1, 10**6)])
@pytest.mark.parametrize("steps, B, T", [(200, 1, 64), (157, 4, 64), (40, 32, 16)])
def test_batches_read_the_text_evenly(seed, begin, steps, B, T):
    """However long: everywhere but at the ends within two of the mean number of times."""
    data = torch.arange(4000)
    windows = [gpt.get_batch(data, B, T, begin + i, seed)[0] for i in range(steps)]
    times = torch.cat(windows).flatten().bincount(minlength=len(data))
    assert (times[T:-T] - steps * B * T / len(data)).abs().max() < 2
