"""Saving and going on: a run that was cut anywhere ends like one that was left alone."""
import itertools
import json
import math

import pytest
import torch

import gpt
from conftest import PLAY, weights
from kills import outcome, saved_step


def cut_at(monkeypatch, step):
    """Let training die when it draws the batch of a step."""
    draw = gpt.get_batch

    def get_batch(data, batch_size, block_size, number, seed=0):
        if number == step:
            raise RuntimeError("cut")
        return draw(data, batch_size, block_size, number, seed)

    monkeypatch.setattr(gpt, "get_batch", get_batch)
    return lambda: monkeypatch.setattr(gpt, "get_batch", draw)


@pytest.fixture
def cut(train, monkeypatch):
    """Train until a step is reached, and die: cut(step, name, **changes) -> folder."""
    def run(step, name, **changes):
        repair = cut_at(monkeypatch, step)
        with pytest.raises(RuntimeError, match="cut"):
            train(name, **changes)
        repair()
        return train.folder / name
    return run


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differences(whole, other):
    """The files of two runs that differ in more than folders and times."""
    expected, found = outcome(whole), outcome(other)
    return [name for name in expected if expected[name] != found[name]]


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("changes", [
    dict(), dict(dropout=0.2), dict(short_fraction=0.9), dict(dtype="float16", dropout=0.2)],
    ids=lambda changes: "-".join(changes) or "plain")
def test_resumed_is_uninterrupted(train, cut, changes, step):
    _, whole = train("whole", **changes)
    cut(step, "cut", **changes)
    assert differences(whole, train("cut", resume=True)[1]) == []


def test_resume_alone_goes_on_as_the_run_was_started(train, cut, monkeypatch):
    """Whatever its flags were, and also where another number format would now be picked."""
    changes = dict(dtype="auto", dropout=0.2, short_fraction=0.5, learning_rate=0.01, seed=3,
                   adamw_learning_rate=0.01, weight_decay=0.7, adamw_weight_decay=0.5,
                   batch_size=6, decay_fraction=0.3, train_temperature=0.7)
    monkeypatch.setattr(gpt, "pick_dtype", lambda device: torch.bfloat16)
    _, whole = train("whole", **changes)
    folder = cut(6, "cut", **changes)
    monkeypatch.setattr(gpt, "pick_dtype", lambda device: torch.float32)
    assert gpt.main(["train", "--resume", "--out_dir", str(folder)]) is None
    assert differences(whole, folder) == []
    about = json.loads((folder / "run.json").read_text())["config"]
    assert about.items() >= (changes | {"dtype": "bfloat16", "compile": "off"}).items()


def test_other_flags_are_laid_over_a_resumed_run(train, cut):
    folder = cut(6, "run", dropout=0.2)
    before = weights(folder)
    words = ["--max_iters", 12, "--batch_size", 8, "--learning_rate", 0, "--dtype", "float16"]
    assert gpt.main([*map(str, ["train", "--resume", "--out_dir", folder, *words])]) is None
    run = json.loads((folder / "run.json").read_text())
    assert [row["step"] for row in run["metrics"]] == [4, 8, 12]
    assert run["config"].items() >= dict(max_iters=12, batch_size=8, learning_rate=0.0,
                                         dtype="float16", dropout=0.2).items()
    for name, matrix in weights(folder).items():  # those of the blocks stay at a rate of 0
        assert torch.equal(matrix, before[name]) == name.startswith("blocks"), name


def test_weight_decay_given_when_resuming_counts(train):
    for name in ("kept", "more"):
        train(name, weight_decay=0.0)
    _, kept = train("kept", resume=True, max_iters=12)
    _, more = train("more", resume=True, max_iters=12, weight_decay=5.0)
    assert not torch.equal(*(weights(folder)["blocks.0.up.weight"] for folder in (kept, more)))


def test_a_resumed_run_trains_for_the_time_that_was_left(train, cut, monkeypatch):
    folder = cut(6, "run", minutes=1.0)
    saved = torch.load(folder / "last.pt", weights_only=True)
    saved["seconds"] = 55.0
    torch.save(saved, folder / "last.pt")
    clock = itertools.count(1000.0)
    monkeypatch.setattr(gpt.time, "perf_counter", lambda: next(clock))
    run, _ = train("run", resume=True)
    assert 4 < run["step"] < 12 and 60 <= run["seconds"] < 65


@pytest.mark.parametrize("changes", [dict(n_layer=1), dict(n_head=1), dict(n_embd=16),
                                     dict(block_size=8)], ids=lambda changes: [*changes][0])
def test_resume_refuses_another_shape(train, cut, changes):
    before = files(cut(6, "run"))
    with pytest.raises(ValueError, match="another text or shape"):
        train("run", resume=True, **changes)
    assert files(train.folder / "run") == before


def test_resume_refuses_another_text(train, cut, text_file):
    """Also one of the same length and the same characters."""
    text = text_file.read_text(encoding="utf-8")
    before = files(cut(6, "run"))
    for other in (text + text[0], text[::-1], "".join(map(chr, range(32, 126))) * 99):
        text_file.write_text(other, encoding="utf-8")
        with pytest.raises(ValueError, match="another text or shape"):
            train("run", resume=True)
    assert files(train.folder / "run") == before


def test_a_run_goes_on_where_its_text_is_not_yet(tmp_path, monkeypatch):
    """On a new machine, tiny Shakespeare is fetched again."""
    (tmp_path / "site").write_bytes(PLAY.read_bytes()[:4000])
    sha256 = gpt.hashlib.sha256((tmp_path / "site").read_bytes()).hexdigest()
    monkeypatch.setattr(gpt, "TEXT", tmp_path / "data/tinyshakespeare.txt")
    monkeypatch.setattr(gpt, "URL", (tmp_path / "site").as_uri())
    monkeypatch.setattr(gpt, "SHA256", sha256)
    words = ["--n_layer", 1, "--n_embd", 16, "--n_head", 2, "--block_size", 16, "--max_iters", 4,
             "--device", "cpu", "--compile", "off", "--out_dir", tmp_path / "run"]
    assert gpt.main([*map(str, ["train", *words])]) is None
    gpt.TEXT.unlink()
    words = ["--resume", "--max_iters", 6, "--out_dir", tmp_path / "run"]
    assert gpt.main([*map(str, ["train", *words])]) is None
    assert gpt.TEXT.exists() and saved_step(tmp_path / "run") == 6


def test_a_run_can_be_resumed_from_the_start_and_its_folder_is_taken(train, cut):
    folder = cut(0, "run")
    assert {path.name for path in folder.iterdir()} == {"last.pt", "metrics.jsonl", "run.json"}
    assert saved_step(folder) == 0
    before = files(folder)
    with pytest.raises(ValueError, match="holds a run: --resume it"):
        train("run")
    assert files(folder) == before


def test_best_is_without_optimizers_and_last_with(train):
    _, folder = train("run")
    states = {name: torch.load(folder / name, weights_only=True)["states"]
              for name in ("best.pt", "last.pt")}
    assert len(states["best.pt"]) == 1 and len(states["last.pt"]) == 3
    assert all(state["state"] and state["param_groups"] for state in states["last.pt"][1:])


def test_a_full_disk_leaves_all_files_as_they_were(train):
    """A limit on the size of files stands for the disk. It is met in the midst of a tensor, where
    torch.save, writing to a file, would raise a RuntimeError."""
    resource = pytest.importorskip("resource")
    _, folder = train("run")
    before, (soft, hard) = files(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert {path.name for path in before} == {"best.pt", "last.pt", "metrics.jsonl", "run.json"}
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "best.pt").stat().st_size // 2, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            train("run", resume=True, max_iters=12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before.items() <= files(folder).items()
    assert train("run", resume=True, max_iters=12)[0]["step"] == saved_step(folder) == 12


@pytest.mark.parametrize("changes", [
    dict(n_embd=2**42),  # more memory than there are addresses
    dict(n_embd=64), dict(n_head=3), dict(n_layer=math.nan), dict(unknown=1)],
    ids=["absurd", "another size", "impossible", "no number", "unknown"])
def test_checkpoints_that_do_not_fit_are_refused(train, changes):
    _, folder = train("run", max_iters=1)
    saved = torch.load(folder / "best.pt", weights_only=True)
    saved["config"] |= changes
    torch.save(saved, folder / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt is no checkpoint"):
        gpt.load(folder / "odd.pt")
