import hashlib
import json
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

import gpt
from conftest import ROOT, same, weights


def rows(out_dir):
    """The metrics without what the clock decides."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if "second" not in key}
            for line in lines]


def cut_at(monkeypatch, step):
    """Let training die when it draws the batch of a step."""
    draw = gpt.get_batch

    def get_batch(data, batch_size, block_size, number, seed=0):
        if number == step:
            raise RuntimeError("cut")
        return draw(data, batch_size, block_size, number, seed)

    monkeypatch.setattr(gpt, "get_batch", get_batch)
    return lambda: monkeypatch.setattr(gpt, "get_batch", draw)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_resumed_is_uninterrupted(train, monkeypatch, dtype, parts):
    options = dict(dtype=dtype, dropout=0.2, gradient_accumulation_steps=parts)
    _, whole = train("whole", **options)
    repair = cut_at(monkeypatch, 6)
    with pytest.raises(RuntimeError, match="cut"):
        train("cut", **options)
    repair()
    _, cut = train("cut", resume=True, **options)
    assert same(weights(whole), weights(cut))
    assert rows(whole) == rows(cut)


def test_a_resumed_run_keeps_its_teachers_and_number_format(train, monkeypatch, capsys):
    teacher = str(train("teacher")[1] / "last.pt")
    _, whole = train("whole", teachers=teacher)
    _, alone = train("alone")
    repair = cut_at(monkeypatch, 6)
    with pytest.raises(RuntimeError, match="cut"):
        train("cut", teachers=teacher)
    repair()
    monkeypatch.setattr(gpt, "product_time", {torch.float32: 2.0, torch.bfloat16: 1.0}.get)
    command = ["train", "--resume", "--out_dir", whole.parent / "cut", "--device", "cpu"]
    assert gpt.main([*map(str, command)]) == 0, capsys.readouterr().err
    assert same(weights(whole), weights(whole.parent / "cut"))
    assert not same(weights(whole), weights(alone))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_run_resumes_to_the_same_weights(tmp_path, text_file, train):
    """kill -9 in the middle, then --resume: the weights of a run that was never killed."""
    shape = ["--n_layer", 2, "--n_head", 2, "--n_embd", 32, "--block_size", 16, "--batch_size", 4,
             "--max_iters", 800, "--eval_interval", 20]
    command = [sys.executable, ROOT / "gpt.py", "train", "--data", text_file, "--out_dir",
               tmp_path / "killed", "--dtype", "float32", "--device", "cpu", "--compile", "off"]
    start = list(map(str, command + shape))
    process = subprocess.Popen(start, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if (tmp_path / "killed/last.pt").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run(list(map(str, command)) + ["--resume"], check=True, capture_output=True)
    preset = {name: value for name, value in gpt.preset("cpu").items() if f"--{name}" not in shape}
    _, whole = train("whole", max_iters=800, eval_interval=400, **preset)
    assert same(weights(whole), weights(tmp_path / "killed"))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT for one process")
def test_interrupted_run_saves_and_says_130(tmp_path, text_file):
    command = [sys.executable, ROOT / "gpt.py", "train", "--data", text_file, "--out_dir",
               tmp_path / "run", "--n_layer", 1, "--n_embd", 32, "--block_size", 16,
               "--max_iters", 1_000_000, "--eval_interval", 20, "--compile", "off"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while not process.stderr.readline().startswith("step"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in rest
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert saved["step"] >= 20 and "state" in saved


def test_the_time_that_was_left_is_not_spent_on_starting_again(train, monkeypatch):
    repair = cut_at(monkeypatch, 6)
    with pytest.raises(RuntimeError, match="cut"):
        train("run", minutes=1.0)
    repair()
    saved = torch.load(train.folder / "run/last.pt", weights_only=True)
    saved["metrics"][-1]["seconds"] = 59.9
    torch.save(saved, train.folder / "run/last.pt")
    load = gpt.load
    monkeypatch.setattr(gpt, "load", lambda *args: time.sleep(0.2) or load(*args))
    run, _ = train("run", resume=True, minutes=1.0)
    assert run["step"] > saved["step"] and run["seconds"] >= 60


def test_a_run_goes_on_where_its_text_is_not_yet(tmp_path, monkeypatch):
    """On a new machine, tiny Shakespeare is fetched again; another text is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt.signal, "signal", lambda *args: None)
    text = (ROOT / gpt.BUNDLED).read_bytes()[:4000]
    monkeypatch.setattr(gpt, "SHA256", hashlib.sha256(text).hexdigest())
    (tmp_path / "site").write_bytes(text)
    monkeypatch.setattr(gpt, "URL", (tmp_path / "site").as_uri())
    words = ["train", "--n_layer", 1, "--n_embd", 16, "--n_head", 2, "--block_size", 16,
             "--max_iters", 4, "--device", "cpu", "--compile", "off", "--out_dir", "run"]
    assert gpt.main([*map(str, words)]) == 0
    for command in (["train", "--resume", "--out_dir", "run"],
                    ["evaluate", "--checkpoint", "run/best.pt"]):
        gpt.TEXT.unlink()
        assert gpt.main(command) == 0 and gpt.TEXT.read_bytes() == text
        gpt.TEXT.write_bytes(text + b"more")
        assert gpt.main(command) == 2
    assert gpt.main([*command, "--data", str(gpt.TEXT)]) == 0


def test_a_run_in_float32_goes_on_in_float16(train, monkeypatch):
    repair = cut_at(monkeypatch, 6)
    with pytest.raises(RuntimeError, match="cut"):
        train("run")
    repair()
    run, _ = train("run", resume=True, dtype="float16")
    assert run["step"] == 8 and run["precision"] == "float16"


def test_best_is_without_optimizers_and_last_with(train):
    _, out_dir = train("run")
    assert "state" not in torch.load(out_dir / "best.pt", weights_only=True)
    assert len(torch.load(out_dir / "last.pt", weights_only=True)["state"]) == 3


@pytest.mark.parametrize("content", [b"new", {"a checkpoint": torch.zeros(3)}])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, content):
    path = tmp_path / "file"
    gpt.write(path, b"old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpt.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        gpt.write(path, content)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_hostile_files_are_refused_and_run_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    path = tmp_path / "hostile.pt"
    torch.save({"config": Hostile()}, path)
    with pytest.raises(gpt.UserError, match="no checkpoint"):
        gpt.load(path, "cpu")
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(gpt.UserError, match="no checkpoint"):
        gpt.load(path, "cpu")
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_that_asks_for_absurd_memory_is_refused(tmp_path, train):
    _, out_dir = train("run")
    saved = torch.load(out_dir / "best.pt", weights_only=True)
    saved["config"] |= {"n_embd": 2**20, "n_layer": 2**10}
    torch.save(saved, tmp_path / "huge.pt")
    with pytest.raises(gpt.UserError, match="no checkpoint"):
        gpt.load(tmp_path / "huge.pt", "cpu")


def test_a_checkpoint_with_fewer_characters_than_ids_is_refused(tmp_path, train):
    _, out_dir = train("run")
    saved = torch.load(out_dir / "best.pt", weights_only=True)
    saved["chars"] = saved["chars"][:-1] + saved["chars"][0]
    torch.save(saved, tmp_path / "twice.pt")
    with pytest.raises(gpt.UserError, match="no checkpoint"):
        gpt.load(tmp_path / "twice.pt", "cpu")


def test_resume_refuses_another_text_or_shape(train, text_file):
    train("run")
    with pytest.raises(gpt.UserError, match="another n_layer"):
        train("run", resume=True, n_layer=1)
    text_file.write_text(text_file.read_text() + "more", encoding="utf-8")
    with pytest.raises(gpt.UserError, match="another text"):
        train("run", resume=True)
