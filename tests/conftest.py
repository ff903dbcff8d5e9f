"""Fixtures that the tests share: a small configuration, a seeded model, a text."""
from dataclasses import replace
from pathlib import Path
import subprocess
import sys

import pytest
import torch

import gpt

ROOT = Path(__file__).parent.parent
PLAY = ROOT / "data/the_salt_tide.txt"


@pytest.fixture
def config():
    return gpt.Config(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, max_iters=8,
                      eval_interval=4, dropout=0.0, device="cpu", dtype="float32", compile="off")


@pytest.fixture
def model(config):
    """A seeded model whose zero matrices are filled, so that everything has an effect."""
    torch.manual_seed(0)
    model = gpt.GPT(config).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.out.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


@pytest.fixture
def idx(config):
    return torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def text_file(tmp_path):
    """4,000 characters of the bundled play."""
    path = tmp_path / "text.txt"
    path.write_text(PLAY.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


@pytest.fixture
def train(config, text_file, tmp_path):
    """Train in a folder under tmp_path: train(name, **changes of the config) -> (run, folder).
    With resume=True it goes on as `gpt.py train --resume` does, the changes laid over."""
    def run(name, resume=False, **changes):
        out_dir, saved, plan = tmp_path / name, None, config
        if resume:
            saved = gpt.load(out_dir / "last.pt")[1]
            plan = gpt.Config(**saved["config"])
        else:
            changes = dict(data=str(text_file), out_dir=str(out_dir)) | changes
        return gpt.train(replace(plan, **changes), saved), out_dir
    run.folder = tmp_path
    return run


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
    return torch.load(folder / name, weights_only=True)["states"][0]


def same(a, b):
    """Whether two dictionaries of tensors are equal in every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
