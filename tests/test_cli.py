"""The command line, as a person uses and misuses it."""
import io
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch

import gpt
from conftest import PLAY, ROOT

SMALL = ("--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--block_size", 16, "--batch_size", 4,
         "--max_iters", 6, "--eval_interval", 3, "--device", "cpu", "--compile", "off")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command line in tmp_path: run("train", ...) -> status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def command(*words):
        capsys.readouterr()
        return gpt.main([*map(str, words)]), *capsys.readouterr()
    return command


@pytest.fixture
def trained(run, text_file):
    status, out, err = run("train", "--data", text_file, "--out_dir", "run", *SMALL)
    assert status is None and out == "", err
    return text_file.parent / "run"


def about(folder):
    return json.loads((folder / "run.json").read_text())


def test_help_shows_every_flag_and_its_default(capsys):
    for words in (["--help"], ["train", "--help"], ["generate", "--help"]):
        with pytest.raises(SystemExit) as stop:
            gpt.main(words)
        assert not stop.value.code
    shown = capsys.readouterr().out
    for name, value in (gpt.asdict(gpt.Config()) | gpt.WRITING).items():
        line = rf"--{name} {name.upper()}\s+default:\s+{re.escape(repr(value))}"
        assert re.search(line, shown), line
    assert "{train,generate}" in shown and "--resume" in shown


def test_what_no_flag_sets_the_preset_decides(run, text_file, monkeypatch):
    """On a CPU, that is `CPU`; where a GPU is, the defaults of `Config`."""
    started = []
    monkeypatch.setattr(gpt, "train", lambda config, saved: started.append(config) or {
        "config": gpt.asdict(config)})
    for there, preset in ((None, gpt.CPU), (gpt.torch.device("cuda"), {})):
        monkeypatch.setattr(gpt.torch.accelerator, "current_accelerator",
                            lambda check_available, there=there: there)
        assert run("train", "--n_layer", 7)[0] is None
        assert started.pop() == gpt.Config(**preset | {"n_layer": 7})


def test_a_folder_that_was_moved_is_resumed_where_it_is(run, text_file, monkeypatch):
    """Without --out_dir, too: the folder of the checkpoint is that of the command, not of old."""
    run("train", "--data", text_file, "--out_dir", "old", *SMALL)
    (text_file.parent / "outputs/runs").mkdir(parents=True)
    shutil.move("old", gpt.Config.out_dir)
    status, _, err = run("train", "--resume", "--max_iters", 8)
    assert status is None and err.endswith(f"--checkpoint {gpt.Config.out_dir}/best.pt\n")
    assert about(text_file.parent / gpt.Config.out_dir)["step"] == 8
    assert not (text_file.parent / "old").exists()


def test_a_text_without_line_breaks_is_learned_and_written(run, tmp_path):
    """Nothing is asked for: the first of its characters is where the model begins."""
    (tmp_path / "line.txt").write_text("the sea gives and the sea takes. " * 60)
    assert run("train", "--data", "line.txt", *SMALL)[0] is None
    status, out, err = run("generate", "--max_new_tokens", 9)
    assert (status, err, len(out)) == (None, "", 9 + 1)


def test_train_tells_what_it_does_and_reached(run, text_file):
    status, out, err = run("train", "--data", text_file, "--out_dir", "run", *SMALL)
    first, *rows, last = err.splitlines()
    assert status is None and out == ""
    assert "cpu" in first and f"3,600 characters of {text_file}" in first
    assert len(rows) == 2 and rows[1].startswith("step 6, 100%:")
    nats, bits, perplexity = map(float, re.findall(r"val (\S+) .* (\S+) bits, perplexity (\S+)",
                                                   rows[1])[0])
    assert nats == pytest.approx(about(text_file.parent / "run")["val_loss"], abs=1e-4)
    assert bits == pytest.approx(nats / math.log(2), abs=1e-3)
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
    assert last.startswith("next: ") and last.endswith("--checkpoint run/best.pt")


def test_generate_goes_on_from_a_prompt(run, trained):
    words = ("generate", "--checkpoint", "run/best.pt", "--prompt", "The ", "--max_new_tokens")
    status, text, err = run(*words, 40)
    assert status is None and err == ""
    assert text.startswith("The ") and len(text) == 4 + 40 + 1
    assert run(*words, 40)[1] == text
    assert run(*words, 40, "--seed", 2)[1] != text
    assert run(*words, 0)[1] == "The \n"


def test_a_run_by_minutes_goes_on_by_steps(run, trained):
    minutes = about(trained)["seconds"] / 60 + 0.02
    status, _, err = run("train", "--out_dir", "run", "--resume", "--minutes", minutes)
    assert status is None, err
    step = about(trained)["step"]
    assert step > 6
    status, _, err = run("train", "--out_dir", "run", "--resume", "--max_iters", step + 3)
    assert status is None, err
    assert about(trained)["step"] == step + 3


def test_the_tilde_is_the_home_folder(run, text_file, monkeypatch, tmp_path):
    """When training, resuming and writing, in files as in folders."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert run("train", "--data", "~/text.txt", "--out_dir", "~/mine", *SMALL)[0] is None
    assert (tmp_path / "mine/best.pt").exists() and not (tmp_path / "~").exists()
    assert run("train", "--out_dir", "~/mine", "--resume", "--max_iters", 7)[0] is None
    assert about(tmp_path / "mine")["step"] == 7
    words = ("generate", "--checkpoint", "~/mine/best.pt", "--max_new_tokens", 3)
    assert len(run(*words)[1]) == 3 + 1


def test_from_any_folder_it_finds_what_lies_beside_it(tmp_path):
    """Also without a network."""
    (tmp_path / "there/data").mkdir(parents=True)
    shutil.copy(ROOT / "gpt.py", tmp_path / "there")
    shutil.copy(PLAY, tmp_path / "there/data")
    source = (tmp_path / "there/gpt.py").read_text(encoding="utf-8")
    (tmp_path / "there/gpt.py").write_text(source.replace("https://raw", "file:///nowhere/raw"))
    done = subprocess.run([sys.executable, "there/gpt.py", "train", *map(str, SMALL)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert done.stderr.startswith("taking ") and "the_salt_tide.txt" in done.stderr.splitlines()[1]


def test_it_writes_character_by_character_also_in_a_notebook_cell(trained, monkeypatch):
    """There, standard output is no file: it can't be reconfigured and has no number."""
    told = []

    class OutStream(io.StringIO):
        reconfigure = property()

        def flush(self):
            told.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", OutStream())
    assert gpt.main(["generate", "--checkpoint", str(trained / "best.pt"),
                     "--max_new_tokens", "5"]) is None
    assert len(sys.stdout.getvalue()) == 5 + 1
    assert [len(text) for text in told][:5] == [1, 2, 3, 4, 5]


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
    (("train", "--device", "cuda"), "there is no cuda here"),
    (("generate", "--checkpoint", "run/best.pt", "--device", "cuda"), "there is no cuda here"),
    (("train", "--dtype", "int8"), "int8"),
    (("train", "--dropout", 1.5), "dropout"),
    (("train", "--data", "text.txt", "--out_dir", "run"), "--resume"),
    (("train", "--data", "text.txt", "--out_dir", "kept"), "--resume"),
    (("train", "--data", "text.txt", "--out_dir", "text.txt"), "text.txt"),
    (("train", "--out_dir", "nothing", "--resume"), "last.pt"),
    (("train", "--out_dir", "run", "--resume"), "finished"),
    (("train", "--out_dir", "run", "--resume", "--n_layer", 2), "shape"),
    (("train", "--out_dir", "run", "--resume", "--data", "other.txt"), "another text"),
    (("generate", "--checkpoint", "missing.pt"), "missing.pt"),
    (("generate", "--checkpoint", "text.txt"), "no checkpoint"),
    (("generate", "--checkpoint", "cut.pt"), "no checkpoint"),
    (("generate", "--checkpoint", "foreign.pt"), "no checkpoint"),
    (("generate", "--checkpoint", "run"), "no checkpoint"),
    (("train", "--out_dir", "foreign", "--resume"), "no checkpoint"),
    (("generate", "--checkpoint", "run/best.pt", "--prompt", "naïve"), "'ï'"),
    (("generate", "--checkpoint", "run/best.pt", "--max_new_tokens", -1), "out of range"),
    (("generate", "--checkpoint", "run/best.pt", "--temperature", -1), "out of range"),
    (("generate", "--checkpoint", "run/best.pt", "--top_p", 0), "out of range"),
]


def test_a_mistake_is_one_line_status_2_and_changes_nothing(run, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt.torch.accelerator, "current_accelerator", lambda **options: None)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.bin").write_bytes(bytes(range(128, 256)))
    (tmp_path / "zeros.bin").write_bytes(bytes(100))
    (tmp_path / "same.txt").write_text("a" * 1000)
    (tmp_path / "cut.txt").write_bytes("The sea ü".encode()[:-1].replace(b"sea ", b"sea"))
    (tmp_path / "short.txt").write_text("too short a text")
    (tmp_path / "other.txt").write_text("Straße " * 100, encoding="utf-8")
    (tmp_path / "cut.pt").write_bytes((trained / "best.pt").read_bytes()[:2000])
    for name in ("kept", "foreign"):
        (tmp_path / name).mkdir()
    shutil.copy(trained / "best.pt", tmp_path / "kept")
    for path in (tmp_path / "foreign.pt", tmp_path / "foreign/last.pt"):
        gpt.torch.save({"model": {}, "step": 3}, path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words, named in MISTAKES:
        if words[0] == "train" and "--resume" not in words and "--data" not in words:
            words = (*words, "--data", "text.txt")
        status, out, err = run(*words)
        told = err.splitlines()
        assert (status, out.strip(), len(told)) == (2, "", 1), (words, err)
        assert told[0].startswith("error: ") and named in told[0], (words, err)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


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


def test_a_checkpoint_from_another_machine_writes_here(trained, run):
    """Trained on a GPU in float16, from a text that isn't here: writing asks for none of them."""
    words = "generate", "--checkpoint", trained / "best.pt", "--max_new_tokens", 40
    status, here, _ = run(*words)
    saved = torch.load(trained / "best.pt", weights_only=True)
    saved["config"] |= {"device": "cuda", "dtype": "float16", "compile": "on",
                        "data": "/gone/text.txt", "out_dir": "/gone"}
    torch.save(saved, trained / "best.pt")
    assert len(here) > 40 and run(*words) == (None, here, "")
