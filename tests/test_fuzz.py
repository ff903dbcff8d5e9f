"""Random texts, logits, settings, command lines and files: whatever comes in, what comes out is
right or one UserError. The cases are the same in every run; the last test counts them."""
import contextlib
import io
import math
import os
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import gpt
from conftest import ROOT

COUNTS = []


def cases(count, **strategies):
    """Run a test on `count` cases drawn from strategies."""
    COUNTS.append(count)
    fixed = settings(max_examples=count, derandomize=True, deadline=None, database=None,
                     suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    return lambda test: fixed(given(**strategies)(test))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory of this module: a finished tiny run, its text, no way to a network."""
    folder = tmp_path_factory.mktemp("fuzz")
    play = (ROOT / gpt.BUNDLED).read_text(encoding="utf-8")
    (folder / "text.txt").write_text(play[:1000], encoding="utf-8")
    (folder / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(gpt, "URL", "http://127.0.0.1:9/")
        patch.setattr(gpt.signal, "signal", lambda *args: None)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.mps, "is_available", lambda: False)
        gpt.train(gpt.Config(n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=2,
                             max_iters=2), "text.txt", "run", device="cpu", compile="off")
        yield folder


# ---- texts ---------------------------------------------------------------------------------------
@cases(300, text=st.text(min_size=1))
def test_round_trip_of_any_text(text):
    tokenizer = gpt.CharTokenizer(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert list(tokenizer.chars) == sorted(set(text)) and ids.max() < len(tokenizer.chars)


@cases(100, text=st.text(), known=st.text(min_size=1))
def test_a_text_is_encoded_or_its_unknown_characters_are_named(text, known):
    tokenizer = gpt.CharTokenizer(known)
    if text and set(text) <= set(known):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    else:
        with pytest.raises(gpt.UserError) as error:
            tokenizer.encode(text)
        assert all(repr(char) in str(error.value) for char in set(text) - set(known))


@cases(300, raw=st.binary() | st.text().map(str.encode))
def test_any_file_is_the_text_it_holds_or_refused(folder, raw):
    (folder / "any").write_bytes(raw)
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        text = ""
    if text and not {"\0", "\ufffd"} & set(text):
        tokenizer, train, val = gpt.load_text(folder / "any")
        assert tokenizer.decode(torch.cat((train, val))) == text
        assert len(train) == int(0.9 * len(text))
    else:
        with pytest.raises(gpt.UserError, match="empty or not UTF-8"):
            gpt.load_text(folder / "any")


# ---- sampling ------------------------------------------------------------------------------------
LOGIT = st.sampled_from([-math.inf, -3e38, -100, -1, 0, 0.5, 1, 100, 3e38]) | st.floats(
    -2.0**100, 2.0**100, width=32) | st.floats(-5, 5, width=32)
ROW = st.lists(LOGIT, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)
SHARE = st.floats(0, 1, exclude_min=True) | st.floats(0.01, 1)
TEMPERATURE = st.just(0) | st.floats(0.1, 5) | st.floats(0, 1e300)


@cases(700, row=ROW, temperature=TEMPERATURE, top_k=st.integers(0, 14) | st.integers(0, 2**80),
       top_p=st.just(1.0) | SHARE, seed=st.integers(0, 1000))
def test_every_filter_allows_what_is_drawn(row, temperature, top_k, top_p, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = gpt.sample_next(torch.tensor([row] * 2), temperature, top_k, top_p, generator)
    assert drawn.shape == (2, 1) and drawn.dtype == torch.int64
    logits = torch.tensor(row).double()  # 32 bits, then more of them
    for i in drawn.flatten().tolist():
        if temperature == 0:
            assert logits[i] == logits.max()
            continue
        probs = ((logits - logits.max()) / temperature).softmax(0)
        likelier = probs[probs > probs[i] * 1.0001]  # what differs less is equal in 32 bits
        assert logits[i] > -math.inf
        assert len(likelier) < (top_k or len(row)) and likelier.sum() < top_p + 1e-5


# ---- settings ------------------------------------------------------------------------------------
PLAUSIBLE = {"n_embd": st.sampled_from([8, 24, 64, 384]), "n_head": st.integers(1, 4),
             "dropout": st.floats(0, 1), "decay_fraction": st.floats(0, 1)}
ODD = st.integers() | st.floats() | st.text(max_size=3) | st.booleans() | st.none() | st.binary()


def plausible(name, kind):
    return PLAUSIBLE.get(name, st.integers(0, 2**31) if kind is int else st.floats(0, 10))


@cases(600, good=st.fixed_dictionaries({}, optional={
    f.name: plausible(f.name, f.type) for f in fields(gpt.Config)}),
    odd=st.dictionaries(st.sampled_from([f.name for f in fields(gpt.Config)]), ODD, max_size=1))
def test_settings_are_possible_or_refused(good, odd):
    try:
        config = gpt.Config(**good | odd)
    except gpt.UserError as error:
        assert any(name in str(error) for name in good | odd)
        return
    assert asdict(config) == asdict(gpt.Config()) | good | odd
    assert config.n_embd % (2 * config.n_head) == 0 and config.dropout < 1
    for f in fields(config):
        value = getattr(config, f.name)
        assert type(value) in (int, f.type) and math.isfinite(value) and value >= 0


# ---- command line --------------------------------------------------------------------------------
def run(*words):
    """Exit status, standard output and standard error of a command line in this process."""
    out, err = io.TextIOWrapper(io.BytesIO(), "ascii", newline=""), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = gpt.main([str(word) for word in words])
        except SystemExit as stop:
            assert {"-h", "--help"} & set(words)
            status = stop.code
    out.flush()
    return status, out.buffer.getvalue().decode("utf-8"), err.getvalue()


# What the operating system passes on: no NUL, no end of a line (it would show up in the message).
WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs", "Cc", "Zl", "Zp"]),
               max_size=5) | st.sampled_from(["", "--", "-", "-1", "nan", "inf", "1e9", "\udcff"])
FILES = st.sampled_from(["text.txt", "short.txt", "missing", ".", "run/best.pt", "run/last.pt"])
VALUES = {"data": FILES, "checkpoint": FILES, "prompt_file": FILES,
          "out_dir": st.sampled_from(["run", "missing/run"]),
          "max_new_tokens": st.integers(-1, 9), "num_samples": st.integers(-1, 2),
          "device": st.sampled_from(gpt.CHOICES["device"]),
          "dtype": st.sampled_from(gpt.CHOICES["dtype"]), "compile": st.just("off")}


def mostly(usual, odd):
    """Nine in ten from `usual`. (one_of counts a strategy that it is given twice only once.)"""
    return st.sampled_from([0] * 9 + [1]).flatmap(lambda which: (usual, odd)[which])


def usual(name):
    """A value that a flag may well have."""
    default = gpt.FLAGS[name][1]
    numbers = {int: st.integers(-2, 9) | st.sampled_from([2**31, 2**63, 2**64, -2**64, 10**30]),
               float: st.floats(-1, 2) | st.floats()}
    return VALUES.get(name, numbers.get(type(default), WORD))


def flag(name):
    """The words for a flag: mostly well formed."""
    if gpt.FLAGS[name][1] is False:
        return st.just((f"--{name}",))
    odd = st.sampled_from(["", "-1", "nan", "1e9", "x"]) if name in VALUES else WORD
    value = mostly(usual(name), odd)
    return value.map(lambda v: (f"--{name}", v)) | value.map(lambda v: (f"--{name}={v}",))


ANY_FLAG = st.sampled_from(sorted(gpt.FLAGS)).flatmap(flag)
NONSENSE = WORD.map(lambda word: (word,)) | st.sampled_from([("--help",), ("-h",), ("--max_itres",),
                                                             ("--resume=yes",), ("--prompt",)])


def flags_of(command):
    return st.sampled_from([n for n in sorted(gpt.FLAGS) if command in gpt.FLAGS[n][0]]).flatmap(
        flag)


@st.composite
def command_lines(draw):
    """Nothing here trains: the one folder to train in holds a finished run. It is refused, or
    resumed at its end."""
    command = draw(st.sampled_from(["train", "generate", "generate", "evaluate"]))
    first = {"train": ["--data", "text.txt", "--device", "cpu", "--compile", "off"],
             "generate": ["--checkpoint", "run/best.pt", "--max_new_tokens", 3],
             "evaluate": ["--checkpoint", "run/best.pt"]}[command]
    flags = draw(st.lists(mostly(flags_of(command), ANY_FLAG | NONSENSE), max_size=4))
    last = ["--out_dir", "run"] if command == "train" else []
    command = draw(mostly(st.just(command), WORD))
    return [command, *first, *(word for words in flags for word in words), *last]


@cases(400, words=command_lines())
def test_any_command_line_ends_with_a_status(folder, words):
    before = sorted(folder.rglob("*"))
    status, out, err = run(*words)
    assert status in (0, 2), (words, err)
    if status == 2:
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (words, err)
    assert sorted(folder.rglob("*")) == before


@cases(150, raw=st.binary(max_size=9) | st.text("Tide \n\r\ufeff", max_size=9).map(str.encode))
def test_any_prompt_file_is_gone_on_from_or_refused(folder, raw):
    (folder / "prompt.txt").write_bytes(raw)
    status, out, err = run("generate", "--checkpoint", "run/best.pt", "--prompt_file", "prompt.txt",
                           "--max_new_tokens", 3)
    (folder / "prompt.txt").unlink()
    if status:
        assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    else:
        prompt = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        assert out.startswith(prompt) and len(out) == len(prompt) + 3 + 1


# ---- checkpoints ---------------------------------------------------------------------------------
def memory():
    """Most memory that this process has had, in bytes; 0 where the system doesn't say."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# The values of the checkpoint stand before its tensors: most changes should fall there.
PLACE = st.integers(0, 3000) | st.integers(0, 10**6)
CHANGES = st.lists(st.tuples(PLACE, st.integers(0, 255)), max_size=6)


@cases(300, changes=CHANGES, cut=st.just(1.0) | st.floats(0, 1),
       name=st.sampled_from(["best.pt", "last.pt"]))
def test_a_damaged_checkpoint_is_a_model_or_refused(folder, changes, cut, name):
    raw = bytearray((folder / "run" / name).read_bytes())
    for place, value in changes:
        raw[place % len(raw)] = value
    (folder / "damaged.pt").write_bytes(raw[:int(cut * len(raw))])
    before = memory()
    try:
        model, tokenizer, _ = gpt.load(folder / "damaged.pt", "cpu")
    except gpt.UserError as error:
        assert "no checkpoint" in str(error)
    else:
        assert isinstance(model, gpt.GPT)
    assert memory() - before < 50e6
    status, _, err = run("generate", "--checkpoint", "damaged.pt", "--max_new_tokens", 20)
    (folder / "damaged.pt").unlink()
    assert status == 0 or (status, err.count("\n")) == (2, 1), err


class Hostile:
    """Unpickled, it calls a function."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


CALL = st.sampled_from([(open, "owned", "w"), (os.system, "touch owned"), (os.mkdir, "owned"),
                        (exec, "open('owned', 'w')"), (eval, "open('owned', 'w')"),
                        (subprocess.call, ["touch", "owned"]), (io.FileIO, "owned", "w")])


@cases(100, call=CALL, data=st.data(), inside=st.booleans())
def test_no_place_in_a_checkpoint_runs_code(folder, call, data, inside):
    saved = torch.load(folder / "run/last.pt", weights_only=True)
    place = saved[data.draw(st.sampled_from(["model", "config"]))] if inside else saved
    place[data.draw(st.sampled_from(sorted(place)))] = Hostile(*call)
    torch.save(saved, folder / "hostile.pt")
    with pytest.raises(gpt.UserError, match="no checkpoint"):
        gpt.load(folder / "hostile.pt", "cpu")
    (folder / "hostile.pt").unlink()
    assert not (folder / "owned").exists()


def test_at_least_two_thousand_cases():
    assert sum(COUNTS) >= 2000
