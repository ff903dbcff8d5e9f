import itertools
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import gpt
from conftest import ROOT, same, weights


def test_learns(train):
    run, out_dir = train("run", max_iters=150, eval_interval=150, batch_size=16)
    start = math.log(len(run["chars"]))
    assert run["metrics"][-1]["train_loss"] < start - 0.7
    model, _, _ = gpt.load(out_dir / "best.pt", "cpu")
    assert model.config.vocab_size == len(run["chars"])


def test_overfits_one_batch(config, idx):
    """Both optimizers and the model, without the training loop around them."""
    model = gpt.GPT(config)
    optimizers = gpt.make_optimizers(model, config)
    for _ in range(100):
        logits = model(idx[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss < 0.1


def test_every_seed_and_step_draws_another_batch(train, monkeypatch, text_file):
    text_file.write_bytes((ROOT / gpt.BUNDLED).read_bytes())  # so long that none agree by chance
    draw, drawn = gpt.get_batch, []

    def get_batch(*args):
        drawn.append(str(draw(*args)))
        return draw(*args)

    monkeypatch.setattr(gpt, "get_batch", get_batch)
    for seed in (0, 1, 3, 5, 2**20):
        train(f"seed-{seed}", seed=seed)
    assert len(drawn) == len(set(drawn)) == 5 * 8


def test_windows_grow_and_the_batch_keeps_its_characters(train, monkeypatch):
    draw, shapes = gpt.get_batch, []

    def get_batch(data, batch_size, block_size, step, seed):
        shapes.append((batch_size, block_size))
        return draw(data, batch_size, block_size, step, seed)

    monkeypatch.setattr(gpt, "get_batch", get_batch)
    train("grows", max_iters=10, short_fraction=0.8)
    train("stays", max_iters=2, short_fraction=0.0)
    assert shapes == [(16, 4)] * 4 + [(8, 8)] * 4 + [(4, 16)] * 4


def test_all_windows_to_come_are_compiled_before_the_first_step(config, text_file, tmp_path,
                                                                monkeypatch):
    """In the loop, a Ctrl-C in the terminal would also end the C++ compiler."""
    tried = []

    def try_compile(model, part, trial, graphs=False):
        trial(lambda x: tried.append(tuple(x.shape)) or model(x))

    monkeypatch.setattr(gpt, "try_compile", try_compile)
    for name, short in (("grows", 0.8), ("stays", 0.0)):
        plan = replace(config, short_fraction=short, gradient_accumulation_steps=2)
        gpt.train(plan, text_file, tmp_path / name, device="cpu", dtype="float32", compile="on")
    assert tried == [(8, 4), (4, 8), (2, 16), (2, 16)]


def test_teachers_are_learned_beside_the_text(train, text_file, monkeypatch):
    """One plain step from zero weights of the head, against the gradient of the formula."""
    taught = [train(f"teacher-{seed}", max_iters=20, seed=seed)[1] / "last.pt" for seed in (5, 6)]
    monkeypatch.setattr(gpt, "make_optimizers", lambda model, config: [
        torch.optim.SGD(model.parameters())])
    run, out_dir = train("run", max_iters=1, gradient_accumulation_steps=2, learning_rate=1.0,
                         teachers=",".join(map(str, taught)))
    _, data, _ = gpt.load_text(text_file)
    x, y = gpt.get_batch(data, 4, 16, 0, seed=1)
    torch.manual_seed(1)
    model = gpt.GPT(gpt.Config(**run["config"]))
    a, b = (gpt.load(path, "cpu")[0](x).detach().softmax(-1) for path in taught)
    logs = (model(x) / 0.92).log_softmax(-1)  # (B, T, V), at train_temperature
    text, teachers = -logs.gather(-1, y[..., None]).mean(), -(logs * (a + b) / 2).sum(-1).mean()
    ((text + teachers) / 2).backward()
    assert (a - b).abs().max() > 0.01 and model.head.grad.abs().max() > 0.01
    assert torch.allclose(weights(out_dir)["head"], -model.head.grad, atol=1e-6)
    assert abs(run["train_loss"] - text) < 1e-6


def test_float16_overflows_are_skipped(train, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **options: scaler(
        *args, init_scale=2.0**30, **options))
    run, out_dir = train("run", dtype="float16", max_iters=30)
    scale = torch.load(out_dir / "last.pt", weights_only=True)["state"][0]["scale"]
    assert 5 < 30 - math.log2(scale) < 25 and math.isfinite(run["val_loss"])  # halved each time


def test_float16_that_always_overflows_stops(train, monkeypatch):
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy",
                        lambda *args, **options: cross_entropy(*args, **options) * 1e30)
    with pytest.raises(gpt.UserError, match="float16 overflows"):
        train("run", dtype="float16", max_iters=60, eval_interval=1000)


def test_same_seed_same_weights(train):
    _, a = train("a")
    _, b = train("b")
    _, c = train("c", seed=2)
    assert same(weights(a), weights(b))
    assert not same(weights(a), weights(c))


def test_evaluation_leaves_no_trace(train):
    _, often = train("often", eval_interval=1, dropout=0.2)
    _, rarely = train("rarely", eval_interval=8, dropout=0.2)
    assert same(weights(often), weights(rarely))


def test_accumulated_gradients_are_those_of_the_whole_batch(train):
    _, whole = train("whole")
    _, parts = train("parts", gradient_accumulation_steps=4)
    for name, tensor in weights(whole).items():
        assert torch.allclose(tensor, weights(parts)[name], atol=1e-4), name


def test_files_agree(train, text_file):
    run, out_dir = train("run")
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    about = json.loads((out_dir / "run.json").read_text())
    assert [row["step"] for row in rows] == [4, 8]
    assert rows[1]["tokens"] == 8 * 4 * 16 and rows[1]["learning_rate"] == 0
    assert set(rows[0]) == {"step", "tokens", "seconds", "train_loss", "val_loss", "learning_rate",
                            "tokens_per_second"}
    assert about["val_loss"] == rows[-1]["val_loss"] == run["val_loss"]
    assert about["best_val_loss"] == min(row["val_loss"] for row in rows)
    assert (about["train_characters"], about["val_characters"]) == (3600, 400)
    model, tokenizer, _ = gpt.load(out_dir / "best.pt", "cpu")
    _, _, val_data = gpt.load_text(text_file, tokenizer)
    assert gpt.evaluate(model, val_data, 16) == pytest.approx(about["best_val_loss"], abs=1e-6)


def test_by_default_it_evaluates_when_it_has_read_the_text_twice(train):
    run, _ = train("run", eval_interval=0, max_iters=230)
    assert 2 * run["train_characters"] // (4 * 16) == 112
    assert [row["step"] for row in run["metrics"]] == [112, 224, 230]


def test_evaluate_covers_every_character_once():
    data = torch.arange(50)
    seen = []

    def model(x):
        seen.extend(x.flatten().tolist())
        return torch.zeros(*x.shape, 50)

    assert gpt.evaluate(model, data, 8) == pytest.approx(math.log(50), abs=1e-5)
    assert seen == list(range(49)) + [0] * 7  # 7 fill the last window


@pytest.mark.parametrize("length", [2, 7, 8, 9, 16, 17, 18, 33, 1025])
def test_evaluate_is_the_mean_over_any_length(model, length):
    data = torch.randint(65, (length,), dtype=torch.int32)
    with torch.no_grad():
        losses = [F.cross_entropy(model(data[None, i:i + 8].long())[0], data[i + 1:i + 9].long(),
                                  reduction="none") for i in range(0, length - 1, 8)
                  if i + 9 <= length]
        if tail := (length - 1) % 8:
            losses.append(F.cross_entropy(model(data[None, -1 - tail:-1].long())[0],
                                          data[-tail:].long(), reduction="none"))
    expected = torch.cat(losses).mean().item()
    assert gpt.evaluate(model, data, 8) == pytest.approx(expected, abs=1e-5)


def test_minutes_end_with_the_clock(train):
    run, _ = train("run", minutes=0.05, max_iters=1, eval_interval=10_000)
    assert 3 <= run["seconds"] < 120
    assert run["metrics"][-1]["learning_rate"] == 0 and run["step"] > 1


def test_a_budget_too_short_for_a_step_still_leaves_a_run(train):
    run, out_dir = train("run", minutes=1e-6)
    assert run["step"] == 1 and (out_dir / "best.pt").exists()


def test_rates_are_flat_then_fall_to_zero(train):
    run, out_dir = train("run", max_iters=10, eval_interval=1, decay_fraction=0.5)
    rates = [row["learning_rate"] / 0.02 for row in run["metrics"]]  # after steps 1 to 10
    expected = [1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0]
    assert rates == pytest.approx(expected, abs=1e-6)
    states = torch.load(out_dir / "last.pt", weights_only=True)["state"][1:]  # after a scaler's
    used = [state["param_groups"][0]["lr"] for state in states]  # in the last step
    assert used == pytest.approx([0.2 * 0.02, 0.2 * run["config"]["adamw_learning_rate"]])


def test_float16_with_a_scaler_trains(train):
    run, _ = train("run", dtype="float16")
    assert run["precision"] == "float16" and math.isfinite(run["val_loss"])


def test_a_loss_that_is_no_number_stops_the_run(train, monkeypatch):
    forward = gpt.GPT.forward
    monkeypatch.setattr(gpt.GPT, "forward", lambda self, x, cache=None: forward(self, x) * math.nan)
    with pytest.raises(gpt.UserError, match="loss is nan by step 4.*learning_rate"):
        train("run")


def test_weights_that_are_no_numbers_are_not_saved(train, monkeypatch):
    """The last update may have ruined them, which the training loss can't show."""
    monkeypatch.setattr(gpt, "evaluate", lambda *args: math.nan)
    with pytest.raises(gpt.UserError, match="loss is nan by step 4"):
        train("run")
    assert [*(train.folder / "run").iterdir()] == []


def test_a_folder_that_cannot_be_written_is_refused_before_training(train, monkeypatch):
    monkeypatch.setattr(gpt.os, "access", lambda *args: False)
    monkeypatch.setattr(gpt, "get_batch", None)
    with pytest.raises(gpt.UserError, match="can't be written"):
        train("run")


@pytest.mark.parametrize("kind, advice", [("cuda", "nproc_per_node"), ("mps", "device cpu")])
def test_processes_without_a_device_each_are_refused(train, monkeypatch, kind, advice):
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_RANK", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(gpt, "pick_device", lambda *args: (torch.device(kind), torch.float32))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(gpt.UserError, match=advice):
        train("run")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_the_plain_ones(kind, compiles):
    """At a size for which the compiler uses wide vectors: GCC 12 made NaN of bfloat16 there."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.Config(n_layer=1, n_head=2, n_embd=128, block_size=64, dropout=0.0))
    for p in (model.out, model.down, model.head):
        torch.nn.init.normal_(p, std=0.05)
    x = torch.randint(65, (32, 64))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16)

    def gradients(forward):
        model.zero_grad()
        F.cross_entropy(autocast(forward)(x).flatten(0, 1).float(), x.flatten()).backward()
        return [p.grad.clone() for p in model.parameters()]

    compiled = gpt.try_compile(model, "block", lambda it: autocast(it)(x).sum().backward())
    for fast, plain in zip(gradients(compiled), gradients(model)):
        assert (fast - plain).norm() < (2e-2 if kind is torch.bfloat16 else 1e-5) * plain.norm()


def test_compile_that_fails_is_dropped_with_a_notice(config, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "LOG", sys.stderr)

    def broken(*args, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpt.torch, "compile", broken)
    model, x = gpt.GPT(config), torch.zeros(1, 4, dtype=torch.long)
    assert gpt.try_compile(model, "block", lambda compiled: compiled(x)) is None
    assert capsys.readouterr().err.count("\n") == 1


def test_precision_by_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert gpt.pick_device("cuda") == (torch.device("cuda"), expected)
    for fast, slow in itertools.permutations((torch.float32, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        monkeypatch.setattr(gpt, "product_time", {fast: 1.0, slow: 2.0}.get)
        assert gpt.pick_device("cpu") == (torch.device("cpu"), fast)
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
        assert gpt.pick_device("cpu") == (torch.device("cpu"), torch.float32)


def test_two_processes_train_like_one(tmp_path, text_file):
    """The same global batch on two gloo processes: equal up to the order of the sums, 1e-4."""
    flags = ["train", "--data", text_file, "--device", "cpu", "--dtype", "float32", "--compile",
             "off", "--n_layer", 1, "--n_embd", 16, "--block_size", 16, "--max_iters", 5]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = [sys.executable, ROOT / "gpt.py", *flags, "--out_dir", tmp_path / "one"]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
           f"--master_port={port}", ROOT / "gpt.py", *flags, "--out_dir", tmp_path / "two"]
    for command in (one, two):
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True,
                              timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-4), name
    assert json.loads((tmp_path / "two/run.json").read_text())["processes"] == 2
