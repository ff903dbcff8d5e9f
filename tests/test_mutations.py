"""Faults that people make, one at a time in a copy of gpt.py. Each must turn the test red that is
named beside it; without a fault, all of these tests are green."""
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

EXPLICIT = "test_model.py::test_attention_is_explicit_softmax"
CAUSAL = "test_model.py::test_causal_at_every_position"
FORMULA = "test_model.py::test_forward_is_the_plain_formula"
BATCH = "test_data.py::test_batch_is_fixed_by_step_and_seed_and_shifted_by_one"
SPLIT = "test_data.py::test_split_is_disjoint_and_complete"
CACHE = "test_generate.py::test_cached_logits_are_the_uncached"
ONE_ROW = "test_generate.py::test_single_characters_as_compiled_give_the_same_logits"
ROUNDED = "test_generate.py::test_text_is_that_of_weights_rounded_to_bfloat16"
HALF = "test_generate.py::test_weights_in_bfloat16_count_as_their_values_in_float32"
WINDOW = "test_generate.py::test_greedy_text_is_the_uncached_also_past_the_window"
FILTERS = "test_generate.py::test_filters_exclude_what_they_should"
WARMTH = "test_generate.py::test_temperature_shapes_the_distribution"
MUON = "test_optimizer.py::test_muon_follows_torchs_muon"
TABLES = "test_optimizer.py::test_embedding_and_head_decay_without_a_gradient"
TAUGHT = "test_train.py::test_teachers_are_learned_beside_the_text"
RATES = "test_train.py::test_rates_are_flat_then_fall_to_zero"
DRAWS = "test_train.py::test_every_seed_and_step_draws_another_batch"
EVEN = "test_data.py::test_batches_read_the_text_evenly"
WHOLE = "test_train.py::test_evaluate_covers_every_character_once"
TRACE = "test_train.py::test_evaluation_leaves_no_trace"
PARTS = "test_train.py::test_accumulated_gradients_are_those_of_the_whole_batch"
RESUME = "test_checkpoint.py::test_resumed_is_uninterrupted"
SAVED = "test_checkpoint.py::test_a_failed_save_leaves_the_old_file_and_nothing_else"

FAULTS = {
    "no mask while training": ("scale + mask).to", "scale).to", EXPLICIT),
    "no mask while generating": ("is_causal=T == S", "is_causal=False", CAUSAL),
    "no mask for a single query, compiled": ("scale + mask).softmax", "scale).softmax", ONE_ROW),
    "mask off by one": ("> place[:, None]", "> place[:, None] + 1", EXPLICIT),
    "no 1 / sqrt(D)": ("1 / math.sqrt(q.size(-1))", "1", EXPLICIT),
    "softmax over the queries": ("weights.sum(-1, keepdim=True, dtype=torch.float)",
                                 "weights.sum(-2, keepdim=True).mT", EXPLICIT),
    "rotary angles of the keys shifted by one":
        ("cos[:, None, None], sin[:, None, None]",
         "*(torch.stack((t, t.roll(-1, 0)), 1)[:, :, None] for t in (cos, sin))", FORMULA),
    "values turned too": ("zip(kv, (k, v))", "zip(kv, (k, rotary(v, cos, sin)))", CACHE),
    "no norm before the MLP": ("linear(norm(x), up)", "linear(x, up)", FORMULA),
    "no QK norm for the queries":
        ("(norm(qk),", "(torch.stack((qk[:, :, 0], norm(qk[:, :, 1])), 2),", FORMULA),
    "ReLU without its square": (".square()  # (B, T, 4C)", "  # (B, T, 4C)", FORMULA),
    "earlier characters forgotten by the cache":
        ("cache.recent.copy_(idx[:, -2:])", "pass", CACHE),
    "cache position off by one": ("cache.length += T", "cache.length += T - 1", CACHE),
    "past the window, the newest key takes the place of the last, not of the oldest":
        ("place % old.size(2)", "place.clamp(max=old.size(2) - 1)", WINDOW),
    "weights not rounded to write": ("(model).bfloat16().float()", "(model)", ROUNDED),
    "embedding added up in bfloat16": ("table).float()", "table)", HALF),
    "targets not shifted": ("window[:, 1:]", "window[:, :-1]", BATCH),
    "validation text in training": ("return tokenizer, ids[:cut]", "return tokenizer, ids", SPLIT),
    "the last window not evaluated":
        ("inputs.split(16)", "inputs[:-1].split(16)", WHOLE),
    "the filling of the last window evaluated": ("value=-100", "value=0", WHOLE),
    "rate not decayed": ("= peak * factor", "= peak", RATES),
    "decay left out": ("p.mul_(1 - lr * group[\"weight_decay\"])", "p", MUON),
    "tables not decayed": ("weight_decay=config.adamw_weight_decay", "weight_decay=0", TABLES),
    "decay coupled with the gradient":
        ("p.grad.lerp(average, momentum))", "p.grad.lerp(average, momentum) + p)", MUON),
    "no Nesterov": ("(p.grad.lerp(average, momentum))", "(average)", MUON),
    "top-p keeps one too few": (".cumsum(-1) - probs < top_p", ".cumsum(-1) < top_p", FILTERS),
    "top-k keeps one too many": ("top_k or logits", "top_k + 1 or logits", FILTERS),
    "temperature ignored": ("(logits / max(temperature, 1e-200))", "logits", WARMTH),
    "every step the same batch": ("block_size // cut, step,", "block_size // cut, 0,", DRAWS),
    "batches read unevenly": ("(5**0.5 - 1) / 2", "0.5", EVEN),
    "train_temperature ignored": (" / config.train_temperature", "", TAUGHT),
    "dropout goes on after an evaluation":
        ("            model.train()\n", "", TRACE),
    "parts of a batch not averaged": ("y.flatten()) / parts", "y.flatten())", PARTS),
    "teachers added, not averaged": (" / len(teach)", "", TAUGHT),
    "optimizers not resumed":
        ("keeper.load_state_dict(state or keeper.state_dict())", "pass", RESUME),
    "saving straight into the file":
        ("Path(f\"{path}.{os.getpid()}.tmp\")", "path", SAVED)}


def red(folder, source, *tests):
    """Whether one of the tests fails on this gpt.py."""
    for name in ("tests", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".pytest.ini", folder)
    (folder / "gpt.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command + [f"tests/{test}" for test in tests], cwd=folder,
                          capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: ran, and a test failed
    return done.returncode == 1


@pytest.fixture
def source():
    return (ROOT / "gpt.py").read_text(encoding="utf-8")


def test_without_a_fault_all_are_green(tmp_path, source):
    assert not red(tmp_path, source, *sorted({test for _, _, test in FAULTS.values()}))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(tmp_path, source, fault):
    right, wrong, test = FAULTS[fault]
    assert source.count(right) == 1
    assert red(tmp_path, source.replace(right, wrong), test)
