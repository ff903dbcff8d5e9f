"""The training loop: what a step computes, what is measured when, and what can go wrong."""
import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpt
from conftest import PLAY, ROOT, same, weights


def test_learns(train):
    run, out_dir = train("run", max_iters=150, eval_interval=150, batch_size=16)
    assert run["train_loss"] < math.log(len(run["chars"])) - 0.7
    model, _ = gpt.load(out_dir / "best.pt")
    assert model.config.vocab_size == len(run["chars"])


def test_overfits_one_batch(config, idx):
    """Both optimizers and the model, without the training loop around them."""
    model = gpt.GPT(config)
    optimizers = gpt.make_optimizers(model, gpt.replace(config, adamw_learning_rate=0.01))
    for _ in range(60):
        loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss < 0.1


def test_a_step_has_the_gradient_of_the_summed_loss(model, config):
    data = torch.randint(65, (200,), generator=torch.Generator().manual_seed(1))
    config = gpt.replace(config, train_temperature=0.5)
    x, y = gpt.get_batch(data, 4, 16, 3, config.seed)
    nats = -(model(x) / 0.5).log_softmax(-1).gather(-1, y[..., None])
    nats.sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    loss = gpt.train_step(model, (), data, config, 3, 0.0)
    assert loss.item() == pytest.approx(nats.mean().item(), abs=1e-5)
    for p, grad in zip(model.parameters(), expected):
        assert (p.grad - grad).norm() < 1e-5 * grad.norm()


def test_gradients_of_the_sum_fit_into_float16():
    """At the shape of batch of a GPU, where there are most characters to add up."""
    text = PLAY.read_text(encoding="utf-8")
    chars = "".join(sorted(set(text)))
    data, largest = gpt.encode(text, chars), []
    config = gpt.Config(n_layer=1, n_head=1, n_embd=16, vocab_size=len(chars))
    assert config.batch_size * config.block_size == 8192
    model = gpt.GPT(config)
    optimizers = gpt.make_optimizers(model, config)
    for step, dtype in enumerate(29 * ["float32"] + ["float16"]):  # a CPU is slow in float16
        plan = gpt.replace(config, dtype=dtype)
        gpt.train_step(model, optimizers, data, plan, step, 0.0)
        largest.append(max(p.grad.abs().max().item() for p in model.parameters()))
    assert 100 < max(largest) < torch.finfo(torch.float16).max / 10


def test_every_seed_and_step_draws_another_batch(train, monkeypatch, text_file):
    text_file.write_bytes(PLAY.read_bytes())  # so long that none agree by chance
    draw, drawn = gpt.get_batch, []

    def get_batch(*args):
        drawn.append(str(draw(*args)))
        return draw(*args)

    monkeypatch.setattr(gpt, "get_batch", get_batch)
    monkeypatch.setattr(gpt, "evaluate", lambda *args: 1.0)
    for seed in (0, 1, 3, 5, 2**20):
        train(f"seed-{seed}", seed=seed)
    assert len(drawn) == len(set(drawn)) == 5 * 8


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of all batches that are drawn."""
    draw, shapes = gpt.get_batch, []

    def get_batch(data, batch_size, block_size, step, seed):
        shapes.append((batch_size, block_size))
        return draw(data, batch_size, block_size, step, seed)

    monkeypatch.setattr(gpt, "get_batch", get_batch)
    return shapes


def test_windows_grow_and_the_batch_keeps_its_characters(train, shapes):
    train("grows", max_iters=10, short_fraction=0.8)
    train("stays", max_iters=2, short_fraction=0.0)
    assert shapes == [(16, 4)] * 4 + [(8, 8)] * 4 + [(4, 16)] * 4


def test_all_windows_are_tried_before_the_first_step_and_leave_no_trace(train, shapes, monkeypatch):
    """In the loop, compiling would take the time of a step, and Ctrl-C would end the compiler."""
    compiled = []
    monkeypatch.setattr(gpt.Block, "compile", lambda it, dynamic: compiled.append(dynamic))
    _, off = train("off", max_iters=4, short_fraction=0.5, dropout=0.2)
    assert compiled == []
    plain = shapes.copy()
    _, on = train("on", max_iters=4, short_fraction=0.5, dropout=0.2, compile="on")
    assert compiled == [False, False]
    assert sorted(shapes[4:7]) == [(4, 16), (8, 8), (16, 4)] and shapes[7:] == plain
    assert same(weights(off), weights(on))
    train("whole", max_iters=1, compile="on")
    assert shapes[11:] == [(4, 16)] * 2


@pytest.fixture
def stance():
    yield
    torch.compiler.set_stance("default")


def test_compile_that_fails_is_dropped_with_one_line(train, monkeypatch, capsys, stance):
    def broken(*args):
        raise RuntimeError("no\ncompiler")

    _, off = train("off", short_fraction=0.5)
    plain = capsys.readouterr().err.splitlines()
    monkeypatch.setattr(gpt.Block, "compile",
                        lambda it, dynamic: nn.Module.compile(it, backend=broken))
    _, on = train("on", short_fraction=0.5, compile="on")
    lines = capsys.readouterr().err.splitlines()
    assert "compile fails" in lines[1] and lines[2:] == plain[1:]
    assert same(weights(off), weights(on))


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_gradients_are_the_plain_ones(dtype):
    """At a size for which the compiler uses wide vectors: GCC 12 made NaN of bfloat16 there."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = gpt.Config(n_layer=1, n_head=2, n_embd=128, block_size=64, dropout=0.0, dtype=dtype)
    model, data = gpt.GPT(config), torch.randint(65, (2000,))
    for matrix in (model.blocks[0].out, model.blocks[0].down, model.head):
        nn.init.normal_(matrix.weight, std=0.05)

    def gradients():
        gpt.train_step(model, (), data, config, 0, 0.0)
        return [p.grad for p in model.parameters()]

    plain = gradients()
    model.blocks[0].compile(dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = gradients()
    assert not all(map(torch.equal, plain, compiled))  # other sums, other rounding
    for a, b in zip(plain, compiled):
        assert (a - b).norm() < (2e-2 if dtype == "bfloat16" else 1e-5) * a.norm()


def test_same_seed_same_weights(train):
    a, b, c, d = (weights(train(f"seed-{i}", seed=seed, dropout=0.2)[1])
                  for i, seed in enumerate((1, 1, 2, 2**44 + 1)))  # the last: only its low 32 bits
    assert same(a, b) and not same(a, c) and same(a, d)


def test_evaluation_leaves_no_trace(train):
    _, often = train("often", eval_interval=1, dropout=0.2)
    _, rarely = train("rarely", eval_interval=8, dropout=0.2)
    assert same(weights(often), weights(rarely))


def test_files_agree(train, text_file):
    run, out_dir = train("run")
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    about = json.loads((out_dir / "run.json").read_text())
    assert about == run and about["metrics"] == rows
    assert [row["step"] for row in rows] == [4, 8]
    assert set(rows[0]) == {"step", "seconds", "train_loss", "val_loss"}
    assert rows[-1].items() <= about.items()
    assert about["config"]["data"] == str(text_file) and about["config"]["dtype"] == "float32"
    model, saved = gpt.load(out_dir / "best.pt")
    val_data = gpt.load_text(text_file)[3]
    best = min(row["val_loss"] for row in rows)
    assert gpt.evaluate(model, val_data, 16) == pytest.approx(best, abs=1e-6)
    assert saved["val_loss"] == best
    assert {path.name for path in out_dir.iterdir()} == {"best.pt", "last.pt", "metrics.jsonl",
                                                         "run.json"}


def test_the_train_loss_of_a_row_is_the_mean_since_the_last(train):
    run, _ = train("often", eval_interval=1)
    losses = [row["train_loss"] for row in run["metrics"]]
    run, _ = train("rarely", eval_interval=4)
    for row, part in zip(run["metrics"], (losses[:4], losses[4:])):
        assert row["train_loss"] == pytest.approx(sum(part) / 4, abs=1e-5)


def test_best_is_that_of_the_lowest_loss(train, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 4.0])
    monkeypatch.setattr(gpt, "evaluate", lambda *args: next(losses))
    _, out_dir = train("run", eval_interval=2)
    best, last = (gpt.load(out_dir / name)[1] for name in ("best.pt", "last.pt"))
    assert (best["step"], best["val_loss"], last["step"]) == (4, 2.0, 8)


def test_by_default_it_evaluates_when_it_has_read_the_text_twice(train):
    run, _ = train("run", eval_interval=0, max_iters=26, batch_size=40)
    assert 2 * 3600 // (40 * 16) == 11
    assert [row["step"] for row in run["metrics"]] == [12, 24, 26]


def test_it_evaluates_every_minute(train, monkeypatch):
    clock = itertools.count(0.0, 7.0)
    monkeypatch.setattr(gpt.time, "perf_counter", lambda: next(clock))
    run, _ = train("run", eval_interval=1000, max_iters=30)
    times = [0, *(row["seconds"] for row in run["metrics"])]
    assert len(times) > 4 and max(b - a for a, b in zip(times, times[1:])) < 75


def test_evaluate_covers_every_character_once():
    seen = []

    def model(x):
        assert x.size(1) <= 8
        seen.extend(x.flatten().tolist())
        return torch.zeros(*x.shape, 50)

    assert gpt.evaluate(model, torch.arange(50), 8) == pytest.approx(math.log(50), abs=1e-5)
    assert seen[:49] == list(range(49)) and set(seen[49:]) <= {0}  # which fill the last window


@pytest.mark.parametrize("length", [2, 7, 8, 9, 16, 17, 18, 33, 1025])
def test_evaluate_is_the_mean_over_any_length(model, length):
    data = torch.randint(65, (length,), generator=torch.Generator().manual_seed(length))
    nats = []
    with torch.no_grad():
        for i in range(0, length - 1, 8):
            y = data[i + 1:i + 9]
            logs = model(data[None, i:i + len(y)])[0].log_softmax(-1)
            nats += [-logs[t, c].item() for t, c in enumerate(y)]
    assert gpt.evaluate(model, data, 8) == pytest.approx(sum(nats) / (length - 1), abs=1e-5)


def test_rates_are_flat_then_fall_to_zero(config):
    config = gpt.replace(config, decay_fraction=0.5)
    model, data = gpt.GPT(config), torch.arange(65)
    optimizers = gpt.make_optimizers(model, config)
    for done, factor in ((0, 1), (0.3, 1), (0.5, 1), (0.6, 0.8), (0.9, 0.2), (1, 0)):
        before = [p.detach().clone() for p in model.parameters()]
        gpt.train_step(model, optimizers, data, config, 0, done)
        for optimizer, peak in zip(optimizers, (0.03, 0.003)):
            for group in optimizer.param_groups:
                assert group["lr"] == pytest.approx(peak * factor)
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before)]
        assert any(moved) == (factor > 0)
    gpt.train_step(model, optimizers, data, gpt.replace(config, decay_fraction=0.0), 0, 0.99)
    assert [group["lr"] for group in optimizers[1].param_groups] == [0.003]


def test_the_loop_tells_each_step_how_much_is_done(train, monkeypatch):
    step, told = gpt.train_step, []
    monkeypatch.setattr(gpt, "train_step", lambda *args: told.append(args[-2:]) or step(*args))
    train("run")
    assert told == [(i, i / 8) for i in range(8)]


def test_minutes_end_with_the_clock(train, monkeypatch):
    step, told = gpt.train_step, []
    monkeypatch.setattr(gpt, "train_step", lambda *args: told.append(args[-1]) or step(*args))
    clock = itertools.count(1000.0)
    monkeypatch.setattr(gpt.time, "perf_counter", lambda: next(clock))
    run, _ = train("run", minutes=0.1, max_iters=1, eval_interval=10_000)
    assert told == pytest.approx([i / 6 for i in range(6)])
    assert run["step"] == 6 and 6 <= run["seconds"] < 10


def test_compiling_counts_as_time(train, monkeypatch):
    clock = [1000.0]

    def later(seconds):
        clock[0] += seconds
        return clock[0]

    monkeypatch.setattr(gpt.time, "perf_counter", lambda: later(1))
    monkeypatch.setattr(gpt.Block, "compile", lambda *args, **options: later(60))
    run, _ = train("run", minutes=0.5, compile="on")  # two blocks, a minute each
    assert run["step"] == 1 and 120 < run["seconds"] < 130


def test_a_budget_too_short_for_a_step_still_leaves_a_run(train):
    run, out_dir = train("run", minutes=1e-6)
    assert run["step"] == 1 and (out_dir / "best.pt").exists()


def test_minutes_are_not_for_several_processes(train, monkeypatch):
    """Their clocks differ, so that one could wait for others that have ended."""
    monkeypatch.setattr(gpt, "WORLD", 2)
    with pytest.raises(ValueError, match="minutes"):
        train("run", minutes=1.0)
    assert not (train.folder / "run").exists()


@pytest.mark.parametrize("broken", ["training", "evaluation"])
def test_a_loss_that_is_no_number_stops_the_run_and_the_files_stay(train, monkeypatch, broken):
    """The last update may have ruined the weights, which the training loss can't show."""
    calls, files = [], {}
    evaluate, forward = gpt.evaluate, gpt.GPT.forward

    def spoilt(*args):
        calls.append(1)
        if len(calls) == 1:
            return evaluate(*args)
        files.update(content(train.folder / "run"))
        return evaluate(*args) if broken == "training" else math.nan

    monkeypatch.setattr(gpt, "evaluate", spoilt)
    if broken == "training":
        monkeypatch.setattr(gpt.GPT, "forward", lambda self, x: forward(self, x) * (
            math.nan if self.training and calls else 1))
    with pytest.raises(ValueError, match="NaN loss.*learning_rate"):
        train("run")
    assert files and content(train.folder / "run") == files
    assert gpt.load(train.folder / "run/last.pt")[1]["step"] == 4


def content(folder):
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_high_loss_is_a_number(train, monkeypatch):
    """Its perplexity is above the largest float."""
    monkeypatch.setattr(gpt, "evaluate", lambda *args: 1e4)
    assert train("run")[0]["val_loss"] == 1e4


def test_dtype_by_capability(monkeypatch):
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert gpt.pick_dtype(torch.device("cuda")) == expected


@pytest.mark.parametrize("times, expected", [([[3, 1], [2, 2]], torch.float32),
                                             ([[2, 2], [9, 1]], torch.bfloat16)])
def test_dtype_by_the_best_of_the_measured_times(monkeypatch, times, expected):
    measured = iter(times)
    monkeypatch.setattr(gpt.timeit, "repeat", lambda *args, **options: next(measured))
    assert gpt.pick_dtype(torch.device("cpu")) == expected


@pytest.mark.parametrize("there, names", [(None, {"auto": "cpu", "cpu": "cpu"}), ("mps", {
    "auto": "mps", "cpu": "cpu", "mps": "mps"})])
def test_devices(monkeypatch, there, names):
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available: there and torch.device(there))
    for name in ("auto", "cpu", "cuda", "mps", "toaster"):
        if name in names:
            assert gpt.pick_device(name) == torch.device(names[name])
        else:
            with pytest.raises(ValueError, match=f"no {name} here"):
                gpt.pick_device(name)


SHAPE = gpt.CPU | dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, dropout=0.2,
                       short_fraction=0.0, decay_fraction=1e-9, dtype="float32", compile="off")


def start(folder, *words, **env):
    """Run Python in `folder`, which holds text.txt, and must end well."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True,
                          text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr


def flags(out_dir, steps):
    shape = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    return ["train", "--data", "text.txt", "--out_dir", out_dir, "--max_iters", str(steps), *shape]


def test_two_processes_train_like_one_and_resume_exactly(tmp_path, text_file, train):
    """The same batch and the same dropout on two gloo processes: equal up to the order of the sums.
    With rates that stay, half of the steps and then --resume are all steps at once."""
    again = ["train", "--out_dir", "half", "--resume", "--max_iters", "8"]
    (tmp_path / "three.py").write_text(f"""
import gpt
from torch import distributed
for words in ({flags("two", 8)}, {flags("half", 4)}, {again}):
    assert gpt.main(words) is None
    distributed.barrier()  # else one could resume what the other has not yet saved
    distributed.init_process_group = lambda: None  # there is one
""")
    said = start(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                 "three.py")
    assert said.count("step 8, 100%") == 2  # of two processes, one tells
    one = weights(train("one", **SHAPE)[1])
    two, half = weights(tmp_path / "two"), weights(tmp_path / "half")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    assert same(two, half) and not same(one, two)


def test_left_over_variables_of_other_launchers_change_nothing(tmp_path, text_file, train):
    start(tmp_path, ROOT / "gpt.py", *flags("left", 8), RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert same(weights(train("alone", **SHAPE)[1]), weights(tmp_path / "left"))
