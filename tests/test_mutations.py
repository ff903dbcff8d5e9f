"""Faults that people make, one at a time in a copy of gpt.py. Each must turn the test red that is
named beside it; without a fault, all of these tests are green."""
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

CAUSAL = "test_model.py::test_causal_at_every_position"
FORMULA = "test_model.py::test_forward_is_the_plain_formula"
NONE = "test_model.py::test_the_row_that_stands_for_no_character_stays_zero"
BATCH = "test_data.py::test_batch_is_fixed_by_step_and_seed_and_shifted_by_one"
EVEN = "test_data.py::test_batches_read_the_text_evenly"
SHARES = "test_data.py::test_shares_of_all_processes_are_the_whole_batch"
SPLIT = "test_data.py::test_split_is_disjoint_and_complete"
CACHE = "test_generate.py::test_cached_logits_are_the_uncached"
MASKS = "test_model.py::test_dropout_draws_one_mask_for_all_positions"
TWO = "test_train.py::test_two_processes_train_like_one_and_resume_exactly"
CLOCK = "test_train.py::test_compiling_counts_as_time"
PRESET = "test_cli.py::test_what_no_flag_sets_the_preset_decides"
WINDOW = "test_generate.py::test_past_the_window_each_layer_sees_the_last_block_size"
FILTERS = "test_generate.py::test_filters_exclude_what_they_should"
WARMTH = "test_generate.py::test_temperature_shapes_the_distribution"
MUON = "test_optimizer.py::test_muon_follows_torchs_muon"
TABLES = "test_optimizer.py::test_embedding_and_head_decay_without_a_gradient"
STEP = "test_train.py::test_a_step_has_the_gradient_of_the_summed_loss"
RATES = "test_train.py::test_rates_are_flat_then_fall_to_zero"
DRAWS = "test_train.py::test_every_seed_and_step_draws_another_batch"
GROWS = "test_train.py::test_windows_grow_and_the_batch_keeps_its_characters"
TRIAL = ("test_train.py::"
         "test_all_windows_are_tried_before_the_first_step_and_leave_no_trace")
NUMBER = "test_train.py::test_a_loss_that_is_no_number_stops_the_run_and_the_files_stay"
WHOLE = "test_train.py::test_evaluate_covers_every_character_once"
MEAN = "test_train.py::test_evaluate_is_the_mean_over_any_length"
TRACE = "test_train.py::test_evaluation_leaves_no_trace"
BEST = "test_train.py::test_best_is_that_of_the_lowest_loss"
RESUME = "test_checkpoint.py::test_resumed_is_uninterrupted"
ALONE = "test_checkpoint.py::test_resume_alone_goes_on_as_the_run_was_started"
LEFT = "test_checkpoint.py::test_a_resumed_run_trains_for_the_time_that_was_left"
FULL = "test_checkpoint.py::test_a_full_disk_leaves_all_files_as_they_were"
DECAY = "test_checkpoint.py::test_weight_decay_given_when_resuming_counts"
SHAPE = "test_checkpoint.py::test_resume_refuses_another_shape"
SECOND = ("test_checkpoint.py::"
          "test_a_run_can_be_resumed_from_the_start_and_its_folder_is_taken")
ORDER = "test_kills.py::test_a_death_before_any_write_loses_nothing"

FAULTS = {
    "no mask for a prompt": ("is_causal=q.size(2) > 1", "is_causal=False", CAUSAL),
    "only the first key for a single query": ("is_causal=q.size(2) > 1", "is_causal=True", CACHE),
    "keys not turned": ("rotary(norm(qkv[:2]), cos, sin)",
                        "(rotary(norm(qkv[0]), cos, sin), norm(qkv[1]))", FORMULA),
    "scores not divided by the root of D": ("q.size(2) > 1)", "q.size(2) > 1, scale=1)", FORMULA),
    "no QK norm for the queries": ("norm(qkv[:2])", "torch.stack((qkv[0], norm(qkv[1])))", FORMULA),
    "queries turned the other way": (
        "rotary(norm(qkv[:2]), cos, sin)",
        "(rotary(norm(qkv[0]), cos, -sin), rotary(norm(qkv[1]), cos, sin))", FORMULA),
    "no norm before the MLP": ("self.up(norm(x))", "self.up(x)", FORMULA),
    "ReLU without its square": ("self.up(norm(x))).square()", "self.up(norm(x)))", FORMULA),
    "heads mixed up": ("y.transpose(1, 2).flatten(2)", "y.reshape(x.shape)", FORMULA),
    "two characters exchanged": ("this, previous, before =", "this, before, previous =", FORMULA),
    "something before the text": ("F.pad(idx, (2, 0), value=V)", "F.pad(idx, (2, 0))", FORMULA),
    "the row for no character learns": (", padding_idx=V", "", NONE),
    "earlier characters forgotten by the cache":
        ("len(place), idx[:, -2:]", "len(place), cache.recent", CACHE),
    "cache position off by one": ("cache.length + len(place)", "cache.length + len(place) - 1",
                                  CACHE),
    "positions begin anew with every character": ("(cache.length if cache else 0)", "0", CACHE),
    "past the window, the newest key takes the place of the last, not of the oldest":
        ("self.length % self.kv.size(-2)", "min(self.length, self.kv.size(-2) - 1)", WINDOW),
    "targets not shifted": ("data[places[:, 1:]]", "data[places[:, :-1]]", BATCH),
    "batches read unevenly": ("(5**0.5 - 1) / 2", "0.5", EVEN),
    "every process reads the whole batch": ("start[RANK::WORLD, None]", "start[:, None]", SHARES),
    "validation text in training": ("encode(text[:cut], chars),", "encode(text, chars),", SPLIT),
    "the last window not evaluated": ("rest = (1 - len(data)) % block_size",
                                      "rest = -((len(data) - 1) % block_size)", WHOLE),
    "the filling of the last window evaluated": ("value=-100", "value=0", MEAN),
    "rate not decayed": ("optimizer.defaults[\"lr\"] * factor", "optimizer.defaults[\"lr\"]",
                         RATES),
    "decay left out": ("p.mul_(1 - group[\"lr\"] * group[\"weight_decay\"])", "p", MUON),
    "tables not decayed": ("weight_decay=config.adamw_weight_decay", "weight_decay=0", TABLES),
    "no Nesterov": ("orthogonalize(grad.lerp(average, group[\"momentum\"]))",
                    "orthogonalize(average)", MUON),
    "no factor for tall matrices": ("max(1, grad.size(-2) / grad.size(-1)) ** 0.5", "1", MUON),
    "top-p keeps one too few": (".cumsum(-1) - probs >=", ".cumsum(-1) >=", FILTERS),
    "top-k keeps one too many": ("min(top_k or", "min(top_k and top_k + 1 or", FILTERS),
    "temperature ignored": (" / max(temperature, 1e-9)", "", WARMTH),
    "every step the same batch": ("config.block_size // cut, step,", "config.block_size // cut, 0,",
                                  DRAWS),
    "short windows without more of them": ("config.batch_size * cut", "config.batch_size", GROWS),
    "train_temperature ignored": (" / config.train_temperature", "", STEP),
    "gradients of the mean": ("loss.backward()", "(loss / y.numel()).backward()", STEP),
    "gradients of the last step kept": ("model.train().zero_grad()", "model.train()", STEP),
    "dropout goes on as in evaluation": ("model.train().zero_grad()", "model.zero_grad()", TRACE),
    "dropout by chance": ("torch.manual_seed(config.seed * 2**20 + step)", "pass", RESUME),
    "one mask for both branches": ("keep[1]", "keep[0]", MASKS),
    "every process drops what the first does": ("[:, RANK::WORLD]", "[:, :len(x)]", TWO),
    "optimizers not resumed": ("zip((model, *optimizers), run", "zip((model,), run", RESUME),
    "old weight decay kept": ("group.update(optimizer.defaults, lr=", "group.update(lr=", DECAY),
    "the worst evaluation kept": ("== min(row[\"val_loss\"]", "== max(row[\"val_loss\"]", BEST),
    "only the first window compiled": ("{0, config.short_fraction / 2, config.short_fraction}",
                                       "{0}", TRIAL),
    "the trial moves the weights": ("train_step(model, (), data", "train_step(model, optimizers, "
                                    "data", TRIAL),
    "a loss that is no number saved": ("math.isfinite(train_loss + val_loss)", "True", NUMBER),
    "a flag forgotten when resuming": ("base = saved[\"config\"] |",
                                       "base = saved[\"config\"] | {\"seed\": 1} |", ALONE),
    "the preset forgotten": ("base = CPU if", "base = {} if", PRESET),
    "compiling not counted": ("    while done < 1:", "    begin = time.perf_counter()\n"
                              "    while done < 1:", CLOCK),
    "the time that was used forgotten": ("time.perf_counter() - run[\"seconds\"]",
                                         "time.perf_counter()", LEFT),
    "saving straight into the file":
        ("\"new.tmp\").write_bytes(file.getbuffer() if \".pt\" in name else content.encode())\n"
         "        os.replace(out_dir / \"new.tmp\",",
         "name).write_bytes(file.getbuffer() if \".pt\" in name else content.encode())\n"
         "        os.replace(out_dir / name,", FULL),
    "another shape accepted": ("[config.n_layer, config.n_head, config.n_embd, config.block_size, "
                               "sha256]", "[sha256]", SHAPE),
    "a folder taken twice": ("not any(out_dir.glob(\"*.pt\"))", "True", SECOND),
    "the end saved before the best": ("{\"best.pt\": run | {\"states\": states[:1]}} | files",
                                      "files | {\"best.pt\": run | {\"states\": states[:1]}}",
                                      ORDER)}


WORKER = """
import faulthandler, os, sys
import pytest
sys.dont_write_bytecode = True  # else Python could take a new gpt.py for the last
for line in sys.stdin:
    for name, module in [*sys.modules.items()]:
        if (getattr(module, "__file__", None) or "").startswith(os.getcwd()):
            del sys.modules[name]
    faulthandler.dump_traceback_later(900, exit=True)
    status = pytest.main(["-x", "-p", "no:cacheprovider", *line.split()])
    print(f"\\nstatus {int(status)}", flush=True)
"""


@pytest.fixture(scope="module")
def red(tmp_path_factory):
    """red(source, *tests): whether one of the tests fails on this gpt.py. All run in one process,
    so that torch is imported once."""
    folder = tmp_path_factory.mktemp("copy").resolve()
    for name in ("tests", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".pytest.ini", folder)
    with subprocess.Popen([sys.executable, "-c", WORKER], cwd=folder, text=True, encoding="utf-8",
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        def run(source, *tests):
            (folder / "gpt.py").write_text(source, encoding="utf-8")
            print(*(f"tests/{test}" for test in tests), file=process.stdin, flush=True)
            said = []
            while not said or said[-1] and not said[-1].startswith("status "):
                said.append(process.stdout.readline())
            assert said[-1] in ("status 0\n", "status 1\n"), "".join(said)  # 1: a test failed
            return said[-1] == "status 1\n"
        yield run


@pytest.fixture
def source():
    return (ROOT / "gpt.py").read_text(encoding="utf-8")


def test_without_a_fault_all_are_green(red, source):
    assert not red(source, *sorted({test for _, _, test in FAULTS.values()}))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(red, source, fault):
    right, wrong, test = FAULTS[fault]
    assert source.count(right) == 1
    assert red(source.replace(right, wrong), test)
