"""What other machines do differently, played on this one."""
import json
import os

import torch

import gpt

# A system whose locale knows ASCII only, and a Python that follows it.
ASCII = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
SMALL = ["--n_layer", 1, "--n_head", 1, "--n_embd", 8, "--block_size", 8, "--batch_size", 2,
         "--device", "cpu", "--dtype", "float32"]


def test_files_are_utf8_where_the_system_is_not(cli, text_file):
    """Text and folder have characters that neither ASCII nor Windows' code page 1252 knows. A
    terminal that cannot show what is written costs one line of error."""
    text = "Ω und ß, naïve 🌊 「海」\n" * 100
    text_file.write_text(text, encoding="utf-8")
    done = cli("train", "--data", text_file, "--out_dir", "海", "--max_iters", 2, *SMALL,
               "--compile", "off", env=ASCII)
    assert done.returncode == 0, done.stderr
    about = json.loads((text_file.parent / "海/run.json").read_text(encoding="utf-8"))
    assert about["step"] == 2 and about["chars"] == "".join(sorted(set(text)))

    words = "generate", "--checkpoint", "海/best.pt", "--prompt", "海 🌊", "--max_new_tokens", 50
    done = cli(*words, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("海 🌊") and set(done.stdout) <= set(text)
    done = cli(*words, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_without_a_compiler_training_goes_on(cli, text_file, tmp_path):
    done = cli("train", "--data", text_file, "--out_dir", "run", "--max_iters", 3, *SMALL,
               env=os.environ | {"CXX": "/no/compiler",
                                 "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("torch.compile fails here") == 1
    assert json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["step"] == 3


class OnMPS(torch.Tensor):
    """A tensor that can do nothing but tell its size and become one on the CPU: MPS has no 64
    bits, and its own generator draws other numbers."""
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function in (torch.Tensor.size, torch.Tensor.float, torch.Tensor.cpu), function
        result = super().__torch_function__(function, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result


def test_logits_are_drawn_from_on_the_cpu():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).repeat(50, 1)

    def drawn(logits):
        return gpt.sample_next(logits, 0.7, 3, 0.9, torch.Generator().manual_seed(1))

    assert torch.equal(drawn(logits.as_subclass(OnMPS)), drawn(logits))
