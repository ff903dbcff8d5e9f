"""The command line, as a person uses and misuses it."""
import io
import json
import math
import re
import shutil
import subprocess
import sys

import pytest

import gpt
from conftest import PLAY, ROOT

SMALL = ("--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--block_size", 16, "--batch_size", 4,
         "--max_iters", 6, "--eval_interval", 3, "--device", "cpu", "--compile", "off")


@pytest.fixture
def trained(cli, text_file, tmp_path):
    done = cli("train", "--data", text_file, "--out_dir", "run", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return tmp_path / "run"


def test_help_shows_every_flag_and_its_default(cli):
    shown = cli("--help").stdout + cli("train", "--help").stdout + cli("generate", "--help").stdout
    for name in [*gpt.asdict(gpt.Config()), *gpt.WRITING, "resume"]:
        assert f"--{name}" in shown
    assert re.search(r"--n_embd N_EMBD\s+default: 256", shown) and "{train,generate}" in shown


def test_train_tells_what_it_does_and_reached(cli, trained, text_file):
    run = json.loads((trained / "run.json").read_text())
    done = cli("train", "--data", text_file, "--out_dir", "again", *SMALL)
    first, *rows, last = done.stderr.splitlines()
    assert "cpu" in first and f"3,600 characters of {text_file}" in first
    assert len(rows) == 2 and rows[1].startswith("step 6, 100%:")
    nats, bits, perplexity = map(float, re.findall(r"val (\S+) .* (\S+) bits, perplexity (\S+)",
                                                   rows[1])[0])
    assert nats == pytest.approx(run["val_loss"], abs=1e-4)
    assert bits == pytest.approx(nats / math.log(2), abs=1e-3)
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
    assert last.startswith("next: ") and last.endswith("--checkpoint again/best.pt")


def test_generate_goes_on_from_a_prompt(cli, trained):
    words = ("generate", "--checkpoint", trained / "best.pt", "--prompt", "The ",
             "--max_new_tokens", 40)
    done = cli(*words)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("The ") and len(done.stdout) == 4 + 40 + 1
    assert cli(*words).stdout == done.stdout
    assert cli(*words, "--seed", 2).stdout != done.stdout
    assert cli(*words[:-1], 0).stdout == "The \n"


def test_resume_needs_no_flags_and_may_have_others(cli, trained):
    done = cli("train", "--out_dir", "run", "--resume")
    assert done.returncode == 2 and "finished" in done.stderr and "--max_iters" in done.stderr
    done = cli("train", "--out_dir", "run", "--resume", "--max_iters", 9, "--batch_size", 2)
    assert done.returncode == 0, done.stderr
    run = json.loads((trained / "run.json").read_text())
    assert run["step"] == 9 and run["config"]["batch_size"] == 2 and run["config"]["n_embd"] == 16


def test_a_run_by_minutes_goes_on_by_steps(cli, trained):
    done = cli("train", "--out_dir", "run", "--resume", "--minutes", 0.02)
    assert done.returncode == 0, done.stderr
    step = json.loads((trained / "run.json").read_text())["step"]
    done = cli("train", "--out_dir", "run", "--resume", "--max_iters", step + 3)
    assert done.returncode == 0, done.stderr
    assert json.loads((trained / "run.json").read_text())["step"] == step + 3


def test_the_tilde_is_the_home_folder(tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    words = ["train", "--data", "~/text.txt", "--out_dir", "~/mine", *map(str, SMALL)]
    assert not gpt.main(words)
    assert (tmp_path / "mine/best.pt").exists()
    assert not gpt.main(["generate", "--checkpoint", "~/mine/best.pt", "--max_new_tokens", "3"])
    assert len(capsys.readouterr().out) == 1 + 3 + 1


def test_from_any_folder_it_finds_what_lies_beside_it(tmp_path):
    """Also without a network."""
    (tmp_path / "there/data").mkdir(parents=True)
    shutil.copy(ROOT / "gpt.py", tmp_path / "there")
    shutil.copy(PLAY, tmp_path / "there/data")
    source = (tmp_path / "there/gpt.py").read_text(encoding="utf-8")
    (tmp_path / "there/gpt.py").write_text(source.replace("https://raw", "file:///nowhere/raw"))
    done = subprocess.run([sys.executable, "there/gpt.py", "train", *map(str, SMALL)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("taking ") and "the_salt_tide.txt" in done.stderr.splitlines()[1]


def test_it_runs_in_a_notebook_cell(trained, monkeypatch):
    """There, standard output is no file: it can't be reconfigured and has no number."""
    class OutStream(io.StringIO):
        reconfigure = property()

    monkeypatch.setattr(sys, "stdout", OutStream())
    assert not gpt.main(["generate", "--checkpoint", str(trained / "best.pt"),
                         "--max_new_tokens", "5"])
    assert len(sys.stdout.getvalue()) == 1 + 5 + 1


MISTAKES = [  # words on the command line, what the line must name
    (("train", "--max_iters", 0), "sizes"),
    (("train", "--n_layer", 0), "sizes"),
    (("train", "--block_size", 3), "block_size"),
    (("train", "--n_embd", 100, "--n_head", 6), "n_embd"),
    (("train", "--data", "missing.txt"), "missing.txt"),
    (("train", "--data", "."), "'.'"),
    (("train", "--data", "empty.txt"), "empty.txt is empty"),
    (("train", "--data", "binary.bin"), "position 0"),
    (("train", "--data", "zeros.bin"), "zeros.bin is empty, binary"),
    (("train", "--data", "same.txt"), "one character"),
    (("train", "--data", "cut.txt"), "position 7"),
    (("train", "--data", "short.txt"), "too short"),
    (("train", "--device", "toaster"), "toaster"),
    (("train", "--dtype", "int8"), "int8"),
    (("train", "--dropout", 1.5, "--out_dir", "new", "--compile", "off"), "dropout"),
    (("train", "--data", "text.txt", "--out_dir", "run"), "--resume"),
    (("train", "--data", "text.txt", "--out_dir", "kept"), "--resume"),
    (("train", "--data", "text.txt", "--out_dir", "text.txt"), "text.txt"),
    (("train", "--out_dir", "nothing", "--resume"), "last.pt"),
    (("train", "--out_dir", "run", "--resume"), "finished"),
    (("train", "--out_dir", "run", "--resume", "--n_layer", 2), "shape"),
    (("train", "--out_dir", "run", "--resume", "--n_head", 1), "shape"),
    (("train", "--out_dir", "run", "--resume", "--block_size", 8), "shape"),
    (("train", "--out_dir", "run", "--resume", "--data", "other.txt"), "another text"),
    (("generate", "--checkpoint", "missing.pt"), "missing.pt"),
    (("generate", "--checkpoint", "text.txt"), "no checkpoint"),
    (("generate", "--checkpoint", "cut.pt"), "no checkpoint"),
    (("generate", "--checkpoint", "run/best.pt", "--prompt", "naïve"), "'ï'"),
    (("generate", "--checkpoint", "run/best.pt", "--prompt", ""), "empty"),
    (("generate", "--checkpoint", "run/best.pt", "--max_new_tokens", -1), "out of range"),
    (("generate", "--checkpoint", "run/best.pt", "--temperature", -1), "out of range"),
    (("generate", "--checkpoint", "run/best.pt", "--top_p", 0), "out of range"),
]


def test_a_mistake_is_one_line_status_2_and_changes_nothing(trained, tmp_path, text_file,
                                                            monkeypatch, capsys):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.bin").write_bytes(bytes(range(128, 256)))
    (tmp_path / "zeros.bin").write_bytes(bytes(100))
    (tmp_path / "same.txt").write_text("a" * 1000)
    (tmp_path / "cut.txt").write_bytes("The sea ü".encode()[:-1].replace(b"sea ", b"sea"))
    (tmp_path / "short.txt").write_text("too short a text")
    (tmp_path / "other.txt").write_text("Straße " * 100, encoding="utf-8")
    (tmp_path / "cut.pt").write_bytes((trained / "best.pt").read_bytes()[:2000])
    (tmp_path / "kept").mkdir()
    shutil.copy(trained / "best.pt", tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words, named in MISTAKES:
        if words[0] == "train" and "--resume" not in words and "--data" not in words:
            words = (*words, "--data", "text.txt")
        status = gpt.main([str(word) for word in words])
        shown = capsys.readouterr()
        told = [line for line in shown.err.splitlines() if not line.startswith("cpu, ")]
        assert (status, shown.out.strip(), len(told)) == (2, "", 1), (words, shown.err)
        assert told[0].startswith("error: ") and named in told[0], (words, shown.err)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize("words, named", [
    ((), "command"), (("fly",), "fly"), (("train", "--max_itres", "5"), "max_itres"),
    (("train", "--max_iters", "many"), "many"), (("train", "--temperature", "1"), "temperature"),
    (("generate", "--prompt"), "prompt")])
def test_argparse_says_the_rest(capsys, words, named):
    with pytest.raises(SystemExit) as stop:
        gpt.main(list(words))
    shown = capsys.readouterr()
    assert stop.value.code == 2 and shown.out == "" and named in shown.err.splitlines()[-1]


@pytest.mark.parametrize("error", [gpt.torch.OutOfMemoryError("CUDA out of memory."),
                                   OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_a_run_is_one_line(monkeypatch, capsys, error):
    def stop(*args):
        raise error

    monkeypatch.setattr(gpt, "train", stop)
    assert gpt.main(["train"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and (str(error) or "interrupted") in shown


def test_an_older_torch_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpt.torch, "__version__", gpt.torch.torch_version.TorchVersion("2.5.1"))
    assert gpt.main(["generate"]) == 2
    assert "2.11" in capsys.readouterr().err


def test_a_mistake_in_a_process_of_its_own(cli):
    done = cli("generate")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and "best.pt" in done.stderr


def test_import_runs_and_prints_nothing():
    done = subprocess.run([sys.executable, "-c", "import gpt"], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
