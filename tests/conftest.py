"""Fixtures that the tests share: a small configuration, a seeded model, a text."""
from dataclasses import replace
from pathlib import Path
import os
import shutil
import subprocess
import sys

import pytest
import torch

import gpt

ROOT = Path(__file__).parent.parent
os.environ["GPT_FAST"] = "1"  # for every notebook that a test runs


@pytest.fixture
def config():
    return gpt.Config(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, max_iters=8,
                      eval_interval=4, dropout=0.0)


@pytest.fixture
def model(config):
    """A seeded model whose zero matrices are filled, so that everything has an effect."""
    torch.manual_seed(0)
    model = gpt.GPT(config).eval()
    for p in (model.out, model.down, model.head):
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture
def idx(config):
    return torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def text_file(tmp_path):
    """4,000 characters of the bundled play."""
    path = tmp_path / "text.txt"
    path.write_text((ROOT / gpt.BUNDLED).read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


@pytest.fixture
def train(config, text_file, tmp_path):
    """Train in a folder under tmp_path: train(name, **changes of the config) -> (run, folder)."""
    def run(name, resume=False, dtype="float32", teachers="", **changes):
        out_dir = tmp_path / name
        return gpt.train(replace(config, **changes), text_file, out_dir, resume, "cpu", dtype,
                         "off", teachers), out_dir
    run.folder = tmp_path
    return run


@pytest.fixture
def compiles(monkeypatch):
    """gpt.try_compile must succeed, so that nothing is compared with itself."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    attempt = gpt.try_compile

    def run(*args, **options):
        compiled = attempt(*args, **options)
        assert compiled is not None
        return compiled

    monkeypatch.setattr(gpt, "try_compile", run)


@pytest.fixture
def cli(tmp_path):
    """Run gpt.py in a subprocess, in tmp_path: cli("train", ...) -> CompletedProcess."""
    def run(*words, cwd=tmp_path, **options):
        return subprocess.run([sys.executable, ROOT / "gpt.py", *map(str, words)], cwd=cwd,
                              capture_output=True, text=True, encoding="utf-8", timeout=120,
                              **options)
    return run


def weights(folder, name="last.pt"):
    """All tensors of a checkpoint's model."""
    return torch.load(folder / name, weights_only=True)["model"]


def same(a, b):
    """Whether two dictionaries of tensors are equal in every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
