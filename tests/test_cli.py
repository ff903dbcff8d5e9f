import json
import re
import subprocess
import sys

import pytest

import gpt
from conftest import ROOT

SMALL = ("--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--block_size", 16, "--batch_size", 4,
         "--max_iters", 6, "--eval_interval", 3, "--device", "cpu", "--compile", "off")


@pytest.fixture
def trained(cli, text_file, tmp_path):
    done = cli("train", "--data", text_file, "--out_dir", "run", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return tmp_path / "run"


def test_help_shows_every_flag_with_meaning_and_default(cli):
    done = cli("--help")
    assert done.returncode == 0
    shown = re.sub(r"\s+", " ", done.stdout)
    for name, (commands, default, meaning) in gpt.FLAGS.items():
        assert f"--{name}" in shown and f"{meaning} (for {commands}; default: {default!r}" in shown
    assert ("384; gpu: 256; cpu: 128; cpu, 7 minutes or more: 128; cpu, 15 minutes or more: 192; "
            "cpu, 30 minutes or more: 256)") in shown


def test_train_generate_evaluate(cli, trained):
    about = json.loads((trained / "run.json").read_text())
    done = cli("evaluate", "--checkpoint", trained / "best.pt")
    nats, bits, perplexity = map(float, re.findall(r"\d+\.\d+", done.stdout))
    assert nats == pytest.approx(about["best_val_loss"], abs=1e-4)
    assert bits == pytest.approx(nats / 0.693147, abs=1e-4)
    assert perplexity == pytest.approx(2.718282 ** nats, abs=1e-2)
    words = ("generate", "--checkpoint", trained / "best.pt", "--prompt", "The ",
             "--max_new_tokens", 40)
    done = cli(*words)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("The ") and len(done.stdout) == 4 + 40 + 1
    assert cli(*words).stdout == done.stdout
    assert cli(*words, "--seed", 2).stdout != done.stdout
    assert cli(*words, "--num_samples", 3).stdout.count("\n---\nThe ") == 2
    assert cli(*words[:-1], 0, "--num_samples", 2).stdout == "The \n---\nThe \n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no broken pipes")
def test_a_reader_that_has_enough_ends_the_text(trained):
    words = ["generate", "--checkpoint", trained / "best.pt", "--max_new_tokens", "9999"]
    with subprocess.Popen([sys.executable, ROOT / "gpt.py", *words], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(60) == 141 and process.stderr.read() == b""


def test_resume_needs_no_flags(cli, trained):
    done = cli("train", "--out_dir", "run", "--resume")
    assert done.returncode == 0, done.stderr


def test_a_text_without_line_breaks_begins_with_its_first_character(cli, tmp_path):
    (tmp_path / "line.txt").write_text("dcba " * 200)
    assert cli("train", "--data", "line.txt", "--out_dir", "line", *SMALL).returncode == 0
    done = cli("generate", "--checkpoint", "line/best.pt", "--max_new_tokens", 5)
    assert done.returncode == 0 and len(done.stdout) == 1 + 5 + 1 and done.stdout[0] == " "


def test_prompt_file(cli, trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("O sea, ", encoding="utf-8")
    done = cli("generate", "--checkpoint", trained / "best.pt", "--prompt_file", "prompt.txt",
               "--max_new_tokens", 5)
    assert done.stdout.startswith("O sea, ")


MISTAKES = [  # words on the command line, what the line must name
    ((), "command"),
    (("fly",), "fly"),
    (("train", "--max_itres", 5), "max_itres"),
    (("train", "--max_iters", "many"), "many"),
    (("train", "--max_iters", 0), "max_iters"),
    (("train", "--max_iters", 5, "--minutes", 5), "not both"),
    (("train", "--temperature", 1), "--temperature is for generate"),
    (("train", "--data", "missing.txt"), "missing.txt"),
    (("train", "--data", "."), "."),
    (("train", "--data", "empty.txt"), "empty.txt is empty"),
    (("train", "--data", "binary.bin"), "binary.bin is empty or not UTF-8"),
    (("train", "--data", "zeros.bin"), "zeros.bin is empty or not UTF-8"),
    (("train", "--data", "short.txt"), "too short"),
    (("train", "--n_embd", 100, "--n_head", 6), "n_embd"),
    (("train", "--n_embd", 6, "--n_head", 2), "even size"),
    (("train", "--dropout", 1.5), "dropout"),
    (("train", "--data", "text.txt", "--batch_size", 5, "--gradient_accumulation_steps", 2),
     "batch_size"),
    (("train", "--device", "cuda"), "there is no cuda here"),
    (("train", "--device", "toaster"), "toaster"),
    (("train", "--dtype", "int8"), "int8"),
    (("train", "--data", "text.txt", "--out_dir", "run"), "--resume"),
    (("train", "--data", "text.txt", "--out_dir", "kept"), "--resume"),
    (("train", "--data", "text.txt", "--out_dir", "text.txt"), "text.txt"),
    (("train", "--out_dir", "nothing", "--resume"), "last.pt"),
    (("train", "--out_dir", "copied", "--resume"), "copy of a best.pt"),
    (("train", "--data", "text.txt", "--out_dir", "run", "--resume", "--n_layer", 2),
     "another n_layer"),
    (("train", "--data", "text.txt", "--out_dir", "run", "--resume", "--teachers", "run/best.pt"),
     "another teachers"),
    (("train", "--data", "text.txt", "--out_dir", "new", "--teachers", "none.pt"), "none.pt"),
    (("train", "--data", "other.txt", "--out_dir", "new", "--teachers", "run/best.pt",
      "--block_size", 16), "another text"),
    (("train", "--data", "text.txt", "--out_dir", "new", "--teachers", "run/best.pt"),
     "shorter windows"),
    (("generate", "--checkpoint", "missing.pt"), "missing.pt"),
    (("generate", "--checkpoint", "text.txt"), "no checkpoint"),
    (("generate", "--checkpoint", "cut.pt"), "no checkpoint"),
    (("generate", "--checkpoint", "run/best.pt", "--prompt", "naïve"), "'ï'"),
    (("generate", "--checkpoint", "run/best.pt", "--prompt", ""), "empty"),
    (("generate", "--checkpoint", "run/best.pt", "--prompt_file", "none.txt"), "none.txt"),
    (("generate", "--checkpoint", "run/best.pt", "--prompt_file", "binary.bin"), "never seen"),
    (("generate", "--checkpoint", "run/best.pt", "--temperature", -1), "temperature"),
    (("generate", "--checkpoint", "run/best.pt", "--top_p", 0), "top_p"),
    (("generate", "--checkpoint", "run/best.pt", "--seed=--"), "--seed"),
    (("evaluate", "--checkpoint", "run/best.pt", "--data", "other.txt"), "'ß'"),
    (("evaluate", "--checkpoint", "run/best.pt", "--data", "tiny.txt"), "shorter than 2"),
]


def test_a_mistake_is_one_line_status_2_and_changes_nothing(trained, tmp_path, text_file,
                                                            monkeypatch, capsys):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.bin").write_bytes(bytes(range(128, 256)))
    (tmp_path / "zeros.bin").write_bytes(bytes(100))
    (tmp_path / "short.txt").write_text("too short a text")
    (tmp_path / "tiny.txt").write_text("a")
    (tmp_path / "other.txt").write_text("Straße " * 100, encoding="utf-8")
    (tmp_path / "cut.pt").write_bytes((trained / "best.pt").read_bytes()[:2000])
    gpt.write(tmp_path / "kept/best.pt", (trained / "best.pt").read_bytes())
    gpt.write(tmp_path / "copied/last.pt", (trained / "best.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt.signal, "signal", lambda *args: None)
    monkeypatch.setattr(gpt.torch.cuda, "is_available", lambda: False)
    gpt.write(gpt.BUNDLED, (ROOT / gpt.BUNDLED).read_bytes())
    gpt.write(gpt.TEXT, b"never trained on")  # a command that got this far would name it
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words, named in MISTAKES:
        status = gpt.main([str(word) for word in words])
        shown = capsys.readouterr()
        assert (status, shown.out, shown.err.count("\n")) == (2, "", 1), (words, shown.err)
        assert shown.err.startswith("error: ") and named in shown.err, (words, shown.err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_memory_that_is_full_is_one_line_status_2(monkeypatch, capsys):
    def full(*args, **options):
        raise gpt.torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")

    monkeypatch.setattr(gpt, "train", full)
    monkeypatch.setattr(gpt.signal, "signal", lambda *args: None)
    assert gpt.main(["train"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--gradient_accumulation_steps" in shown


def test_a_mistake_in_a_process_of_its_own(cli):
    done = cli("generate")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and "best.pt" in done.stderr


def test_import_runs_and_prints_nothing():
    done = subprocess.run([sys.executable, "-c", "import gpt"], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
