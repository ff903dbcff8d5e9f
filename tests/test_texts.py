"""Texts of every kind, from one symbol to thousands: read right, and trained on."""
import math
import os
import subprocess
import sys

import pytest
import torch

import gpt
from conftest import ROOT

CJK = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
TEXTS = {  # what the file holds, what is read
    "byte order mark": ("\ufeffto be " * 30, "to be " + "\ufeffto be " * 29),
    "CRLF": ("To be,\r\nor not\r\n" * 20, "To be,\nor not\n" * 20),
    "old Mac": ("To be,\ror not\r" * 20, "To be,\nor not\n" * 20),
    "mixed line ends": ("a\r\nb\nc\r\r\n" * 20, "a\nb\nc\n\n" * 20),
    "other line ends": ("a\u2028b\x0bc\x85d\x0c" * 20,) * 2,
    "emoji": ("The sea 🌊👩‍🚀🇮🇸 rose. " * 20,) * 2,
    "accents": ("nai\u0308ve naïve " * 20,) * 2,
    "3,000 symbols": (CJK + CJK[::-1],) * 2,
    "one symbol": ("a" * 200,) * 2,
    "no last line end": ("line\n" * 40 + "end",) * 2}


@pytest.mark.parametrize("written, read", TEXTS.values(), ids=TEXTS)
def test_any_text_is_read_and_trained_on(config, tmp_path, written, read):
    path, out_dir = tmp_path / "text.txt", tmp_path / "run"
    path.write_bytes(written.encode())
    tokenizer, train, val = gpt.load_text(path)
    assert tokenizer.decode(torch.cat((train, val))) == read
    run = gpt.train(gpt.replace(config, max_iters=2), path, out_dir, device="cpu", compile="off")
    assert run["step"] == 2 and math.isfinite(run["val_loss"])
    model, tokenizer, saved = gpt.load(out_dir / "best.pt", "cpu")
    assert saved["chars"] == "".join(sorted(set(read)))
    text = tokenizer.decode(int(i) for i in gpt.generate(model, train[None, :3].long(), 20))
    assert len(text) == 20 and set(text) <= set(read)


MEASURE = """
import sys, gpt
def peak():  # of this program; ru_maxrss would count the process that started it
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
gpt.load_text(sys.argv[1])
before = peak()
gpt.load_text(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_long_text_takes_at_most_six_bytes_a_character(text_file, tmp_path):
    """One for the text, four for the ids. glibc returns what is freed at once, as it does on its
    own for 100 MB and more."""
    line = "To be, or not to be: that is the question.\n"
    (tmp_path / "long.txt").write_text(line * (10_000_000 // len(line)))
    done = subprocess.run([sys.executable, "-c", MEASURE, text_file, tmp_path / "long.txt"],
                          capture_output=True, text=True, check=True, env=os.environ | {
                              "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert 4e7 < int(done.stdout) < 6e7
