"""Texts of every kind, from two symbols to thousands: read right, and trained on."""
from dataclasses import replace
import math

import pytest
import torch

import gpt

CJK = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
TEXTS = {  # what the file holds, what is read
    "byte order mark": ("\ufeffto be " * 30, "to be " + "\ufeffto be " * 29),
    "CRLF": ("To be,\r\nor not\r\n" * 20, "To be,\nor not\n" * 20),
    "old Mac": ("To be,\ror not\r" * 20, "To be,\nor not\n" * 20),
    "mixed line ends": ("a\r\nb\nc\r\r\n" * 20, "a\nb\nc\n\n" * 20),
    "other line ends": ("a\u2028b\x0bc\x85d\x0c" * 20,) * 2,
    "emoji": ("The sea 🌊👩‍🚀🇮🇸 rose. " * 20,) * 2,
    "accents": ("nai\u0308ve naïve " * 20,) * 2,
    "replacement characters": ("lost \ufffd and found " * 20,) * 2,
    "3,000 symbols": (CJK + CJK[::-1],) * 2,
    "two symbols": ("ab" * 100,) * 2,
    "no last line end": ("line\n" * 40 + "end",) * 2}


@pytest.mark.parametrize("written, read", TEXTS.values(), ids=TEXTS)
def test_any_text_is_read_and_trained_on(config, tmp_path, written, read):
    path, out_dir = tmp_path / "text.txt", tmp_path / "run"
    path.write_bytes(written.encode())
    _, chars, train, val, _ = gpt.load_text(path)
    assert "".join(chars[i] for i in torch.cat((train, val))) == read
    run = gpt.train(replace(config, max_iters=2, data=str(path), out_dir=str(out_dir)))
    assert run["step"] == 2 and math.isfinite(run["val_loss"])
    model, saved = gpt.load(out_dir / "best.pt")
    assert saved["chars"] == chars == "".join(sorted(set(read)))
    text = "".join(chars[i] for i in gpt.generate(model, train[None, :3], 20))
    assert len(text) == 20 and set(text) <= set(read)


@pytest.mark.parametrize("length, fits", [(18, False), (19, True)])
def test_a_text_shorter_than_the_window_is_refused(config, tmp_path, length, fits):
    """Training needs 17 characters: a window of 16 and the one after it. The rest validates."""
    path, out_dir = tmp_path / "text.txt", tmp_path / "run"
    path.write_text("to be or not to be."[:length], encoding="utf-8")
    plan = replace(config, max_iters=1, data=str(path), out_dir=str(out_dir))
    if fits:
        assert gpt.train(plan)["step"] == 1
    else:
        with pytest.raises(ValueError, match="too short: lower --block_size"):
            gpt.train(plan)
        assert not out_dir.exists()
