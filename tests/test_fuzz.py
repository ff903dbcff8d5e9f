"""Random texts, logits, command lines and files: whatever comes in, what comes out is right or one
error. The cases are the same in every run."""
import contextlib
import io
import math
import os
import pickle
import shutil
import subprocess
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import gpt
from conftest import PLAY

def cases(count, **strategies):
    """Run a test on `count` cases drawn from strategies."""
    fixed = settings(max_examples=count, derandomize=True, deadline=None, database=None,
                     suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    return lambda test: fixed(given(**strategies)(test))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory of this module: a finished tiny run, its text, no way to a network."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "text.txt").write_text(PLAY.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    (folder / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(gpt, "TEXT", folder / "text.txt")
        patch.setattr(torch.accelerator, "current_accelerator", lambda **options: None)
        gpt.train(gpt.Config(data="text.txt", out_dir="run", n_layer=1, n_head=1, n_embd=8,
                             block_size=8, batch_size=2, max_iters=2, dtype="float32",
                             compile="off"))
        yield folder


# ---- texts ---------------------------------------------------------------------------------------
@cases(200, text=st.text(), known=st.text(min_size=1))
def test_a_text_is_encoded_or_its_unknown_characters_are_named(text, known):
    chars = "".join(sorted(set(known)))
    assert "".join(chars[i] for i in gpt.encode(known, chars)) == known
    if text and set(text) <= set(known):
        assert "".join(chars[i] for i in gpt.encode(text, chars)) == text
    else:
        with pytest.raises(ValueError) as error:
            gpt.encode(text, chars)
        assert all(repr(char) in str(error.value) for char in set(text) - set(known))


@cases(300, raw=st.binary() | st.text().map(str.encode))
def test_any_file_is_the_text_it_holds_or_refused(folder, raw):
    (folder / "any").write_bytes(raw)
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        text = ""
    if len(set(text)) > 1 and "\0" not in text:
        _, chars, train, val, _ = gpt.load_text(folder / "any")
        assert "".join(chars[i] for i in torch.cat((train, val))) == text
        assert list(chars) == sorted(set(text)) and len(train) == int(0.9 * len(text))
    else:
        with pytest.raises(ValueError, match="empty, binary, or of one character|decode byte"):
            gpt.load_text(folder / "any")
    (folder / "any").unlink()


# ---- sampling ------------------------------------------------------------------------------------
LOGIT = st.sampled_from([-math.inf, -3e38, -100, -1, 0, 0.5, 1, 100, 3e38]) | st.floats(
    -2.0**100, 2.0**100, width=32) | st.floats(-5, 5, width=32)
ROW = st.lists(LOGIT, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)
SHARE = st.floats(1e-30, 1) | st.floats(0.01, 1)
TEMPERATURE = st.just(0) | st.floats(0.1, 5) | st.floats(0, 1e30)


@cases(600, row=ROW, temperature=TEMPERATURE, top_k=st.integers(0, 14) | st.integers(0, 2**80),
       top_p=st.just(1.0) | SHARE, seed=st.integers(0, 1000))
def test_every_filter_allows_what_is_drawn(row, temperature, top_k, top_p, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = gpt.sample_next(torch.tensor([row] * 2), temperature, top_k, top_p, generator)
    assert drawn.shape == (2, 1) and drawn.dtype == torch.int64
    logits = torch.tensor(row).double()  # 32 bits, then more of them
    for i in drawn.flatten().tolist():
        if temperature == 0:
            assert logits[i] >= logits.max() - 1e-6
            continue
        probs = ((logits - logits.max()) / max(temperature, 1e-9)).softmax(0)
        likelier = probs[probs > probs[i] * 1.0001]  # what differs less is equal in 32 bits
        assert logits[i] > -math.inf
        assert len(likelier) < (top_k or len(row)) and likelier.sum() < top_p + 1e-5


# ---- command line --------------------------------------------------------------------------------
def run(*words):
    """Exit status, standard output and standard error of a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = gpt.main([str(word) for word in words]) or 0
        except SystemExit as stop:  # of argparse: help, or flags that it does not know
            status = stop.code
    return status, out.getvalue(), err.getvalue()


# What the operating system passes on: no NUL, no end of a line (it would show up in the message).
WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs", "Cc", "Zl", "Zp"]),
               max_size=5) | st.sampled_from(["", "--", "-", "-1", "nan", "x", "\udcff"])
FILES = st.sampled_from(["text.txt", "short.txt", "missing", ".", "run/best.pt", "run/last.pt"])
SIZE, RATE = st.integers(-1, 9), st.floats(0, 2)
FLAGS = {  # values that a flag may well have; nothing that trains for long or fills the memory
    "train": {"data": FILES, "n_layer": SIZE, "n_head": SIZE, "n_embd": SIZE, "block_size": SIZE,
              "batch_size": SIZE, "max_iters": SIZE, "learning_rate": RATE,
              "adamw_learning_rate": RATE, "weight_decay": RATE, "adamw_weight_decay": RATE,
              "decay_fraction": st.floats(0.1, 2), "short_fraction": RATE,
              "dropout": RATE, "train_temperature": RATE, "eval_interval": SIZE,
              "seed": st.integers(), "device": st.sampled_from(["auto", "cpu", "cuda", "mps"]),
              "dtype": st.sampled_from(["auto", "float32", "bfloat16", "x"]),
              "compile": st.just("off")},
    "generate": {"checkpoint": FILES, "prompt": st.text("Tide \n", max_size=12) | WORD,
                 "max_new_tokens": SIZE, "temperature": st.floats(-1, 2), "top_k": st.integers(-2),
                 "top_p": st.floats(0.01, 2) | st.sampled_from([-1, 0, 1e-30, math.nan]),
                 "seed": st.integers(), "device": st.sampled_from(["auto", "cpu", "cuda", "mps"])}}
FIRST = {"train": ["--data", "text.txt", "--out_dir", "again", "--compile", "off"],
         "generate": ["--checkpoint", "run/best.pt", "--max_new_tokens", 3]}


def flag(command):
    """The words for a flag of this command, its file more often: nine in ten well formed."""
    names = [*FLAGS[command], *list(FLAGS[command])[:1] * 3]

    @st.composite
    def words(draw):
        name = draw(st.sampled_from(names))
        if draw(st.integers(0, 9)):
            return f"--{name}={draw(FLAGS[command][name])}",
        return draw(st.sampled_from([(f"--{name}",), ("--seed", "x"), ("--seed", ""), ("--",),
                                     ("-",), ("--max_itres=3",), ("--resume=yes",), ("--help",)]))
    return words()


@st.composite
def command_lines(draw):
    """The folder to train in holds a run of two steps: refused, or resumed for up to nine."""
    if not draw(st.integers(0, 9)):
        return draw(st.lists(WORD, max_size=3))
    command = draw(st.sampled_from(["train", "generate"]))
    flags = [word for words in draw(st.lists(flag(command), max_size=3)) for word in words]
    if command == "train" and draw(st.booleans()):
        flags = ["--resume", "--max_iters", draw(st.integers(1, 9)), *flags]
    return [command, *FIRST[command], *flags]


def everything(folder):
    """All files, with what they hold where no training goes on."""
    return {path: path.parent.name == "again" or path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@cases(200, words=command_lines())
def test_any_command_line_ends_with_a_status(folder, words):
    shutil.copytree(folder / "run", folder / "again", dirs_exist_ok=True)
    before = everything(folder)
    status, out, err = run(*words)
    lines = err.splitlines() or [""]
    if status == 0:
        assert out or lines[-1].startswith("next: "), words
    else:
        assert status == 2 and (lines[-1].startswith("error: ") or err.startswith("usage: ")), words
        assert all(line.startswith(("cpu, ", "step ")) for line in lines[:-1]) or "usage" in err
    assert everything(folder) == before


@cases(100, prompt=st.text("Tide ,\n", min_size=1), new=st.integers(0, 12))
def test_any_prompt_is_gone_on_from(folder, prompt, new):
    status, out, err = run("generate", "--checkpoint", "run/best.pt", f"--prompt={prompt}",
                           "--max_new_tokens", new)
    assert (status, err) == (0, "")
    assert out.startswith(prompt) and out.endswith("\n") and len(out) == len(prompt) + new + 1


# ---- checkpoints ---------------------------------------------------------------------------------
# The values of the checkpoint stand before its tensors: most changes should fall there.
PLACE = st.integers(0, 3000) | st.integers(0, 10**6)
CHANGES = st.lists(st.tuples(PLACE, st.integers(0, 255)), max_size=6)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@cases(200, changes=CHANGES, cut=st.just(1.0) | st.floats(0, 1),
       name=st.sampled_from(["best.pt", "last.pt"]))
def test_a_damaged_checkpoint_is_a_model_or_refused(folder, changes, cut, name):
    raw = bytearray((folder / "run" / name).read_bytes())
    for place, value in changes:
        raw[place % len(raw)] = value
    (folder / "damaged.pt").write_bytes(raw[:int(cut * len(raw))])
    try:
        model, _ = gpt.load(folder / "damaged.pt")
    except ValueError as error:
        assert "damaged.pt is no checkpoint" in str(error)
    else:
        assert isinstance(model, gpt.GPT)
    (folder / "damaged.pt").unlink()


class Hostile:
    """Unpickled, it calls a function."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


CALL = st.sampled_from([(open, "owned", "w"), (os.system, "touch owned"), (os.mkdir, "owned"),
                        (exec, "open('owned', 'w')"), (eval, "open('owned', 'w')"),
                        (subprocess.call, ["touch", "owned"]), (io.FileIO, "owned", "w")])


@cases(100, call=CALL, data=st.data(), where=st.sampled_from(["deep", "above", "alone"]))
def test_no_place_in_a_checkpoint_runs_code(folder, call, data, where):
    saved = torch.load(folder / "run/last.pt", weights_only=True)
    place = saved
    if where == "deep":
        place = data.draw(st.sampled_from([saved["config"], *saved["states"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = Hostile(*call)
    torch.save(saved, folder / "hostile.pt")
    if where == "alone":
        (folder / "hostile.pt").write_bytes(pickle.dumps(Hostile(*call)))
    with pytest.raises(ValueError, match="no checkpoint"):
        gpt.load(folder / "hostile.pt")
    (folder / "hostile.pt").unlink()
    assert not (folder / "owned").exists()


def test_the_flags_tried_are_those_there_are():
    """But for vocab_size, which the text decides, and what a run must not get here: where it goes,
    and how long it takes."""
    left_out = {"out_dir", "vocab_size", "minutes"}
    assert set(FLAGS["train"]) == set(asdict(gpt.Config())) - left_out
    assert set(FLAGS["generate"]) == set(gpt.WRITING)
