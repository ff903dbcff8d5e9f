"""What other machines do differently, played on this one."""
import json
import os
import subprocess
import sys

import torch

import gpt
from conftest import ROOT


def test_text_goes_out_as_utf8_where_the_terminal_is_not(train, text_file, tmp_path):
    """Windows' code page 1252, and a system whose locale knows ASCII only."""
    text = "Ω und ß, naïve 🌊 「海」\n" * 100
    text_file.write_text(text, encoding="utf-8")
    _, out_dir = train("run")
    (tmp_path / "prompt.txt").write_text("海 🌊", encoding="utf-8")
    command = [sys.executable, "-X", "utf8=0", ROOT / "gpt.py", "generate", "--checkpoint",
               out_dir / "best.pt", "--prompt_file", tmp_path / "prompt.txt", "--max_new_tokens",
               "50", "--num_samples", "2"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {
        "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stderr) == (0, b"")
    written = done.stdout.decode("utf-8").replace("\r\n", "\n")
    assert written.startswith("海 🌊") and "\n---\n海 🌊" in written
    assert set(written) <= set(text) | {"-"}


def test_without_a_compiler_training_goes_on(tmp_path, text_file):
    flags = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "8",
             "--batch_size", "2", "--max_iters", "3", "--device", "cpu", "--compile", "on"]
    done = subprocess.run(
        [sys.executable, ROOT / "gpt.py", "train", "--data", text_file, "--out_dir", "run", *flags],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {
            "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("torch.compile fails here") == 1
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["step"] == 3 and not about["compiled"]


class OnMPS(torch.Tensor):
    """A tensor that can do nothing but become one on the CPU: MPS has no 64 bits, and its own
    generator draws other numbers."""
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function in (torch.Tensor.float, torch.Tensor.cpu), function
        result = super().__torch_function__(function, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result


def test_logits_are_drawn_from_on_the_cpu():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(50, 1)

    def drawn(logits):
        return gpt.sample_next(logits, 0.7, 3, 0.9, torch.Generator().manual_seed(1))

    assert torch.equal(drawn(logits.as_subclass(OnMPS)), drawn(logits))
