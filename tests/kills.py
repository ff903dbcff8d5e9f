"""Kill a training run at random moments, resume it, and compare it with one that was left alone.

    python tests/kills.py --kills 20

Each run trains the same tiny model on the bundled play; the runs take turns among the variants.
A run is killed by SIGKILL at a moment drawn from the whole life of a process, start-up and saving
included, goes on with --resume alone (or starts, if it had not come to its first file), and may be
killed again, up to three times. When it has come to its end, its files are compared with those of a
run of the same flags that was left alone: weights, states of the optimizers and all else but times
and folders bit for bit. Then the next run starts, until all kills are done.
One line for each kill; exit status 1 if anything differs."""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

FLAGS = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 64, "batch_size": 4,
         "dropout": 0.0, "short_fraction": 0.0, "eval_interval": 10, "dtype": "float32",
         "compile": "off", "device": "cpu", "data": ROOT / "data/the_salt_tide.txt"}
VARIANTS = {"plain": {}, "dropout": {"dropout": 0.2}, "short": {"short_fraction": 0.8},
            "float16": {"dtype": "float16"}}


def start(out_dir, flags):
    """A process that trains in out_dir from where the last one came to."""
    words = ["--out_dir", out_dir]
    if (out_dir / "last.pt").exists():
        words += ["--resume"]
    else:
        words += [word for name, value in flags.items() for word in (f"--{name}", value)]
    return subprocess.Popen([sys.executable, ROOT / "gpt.py", "train", *map(str, words)],
                            stderr=subprocess.PIPE, text=True)


def killed(process, seconds):
    """Whether SIGKILL ended a process, rather than its own end. Raises if it ended badly."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    if process.returncode in (0, -9):
        return process.returncode != 0
    raise RuntimeError(f"a run ended with status {process.returncode}:\n{said}")


def plain(value):
    """A value that == compares in every bit, without the folder, what the clock decides, and a
    setting that torch adds to optimizers whose state was loaded."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()
                if key not in ("seconds", "out_dir", "differentiable")}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.shape, value.contiguous().numpy().tobytes()
    return repr(value)


def outcome(out_dir):
    """All that a run has left, by file."""
    found = {name: plain(torch.load(out_dir / name, weights_only=True))
             for name in ("last.pt", "best.pt")}
    rows = (out_dir / "metrics.jsonl").read_text().splitlines()
    return found | {"metrics.jsonl": [plain(json.loads(row)) for row in rows],
                    "run.json": plain(json.loads((out_dir / "run.json").read_text()))}


def saved_step(out_dir):
    last = out_dir / "last.pt"
    return torch.load(last, weights_only=True)["step"] if last.exists() else None


def kill_runs(kills, steps, seed, folder, variants):
    """Number of runs that differ from the one left alone, after so many kills."""
    draw, whole, life, done, runs, wrong = random.Random(seed), {}, {}, 0, 0, 0
    while done < kills:
        name = variants[runs % len(variants)]
        flags = FLAGS | VARIANTS[name] | {"max_iters": steps}
        if name not in whole:
            begin = time.perf_counter()
            killed(start(folder / name, flags), None)
            life[name], whole[name] = time.perf_counter() - begin, outcome(folder / name)
            print(f"{name}, left alone: {steps} steps, {life[name]:.1f} seconds", flush=True)
        runs += 1
        out_dir = folder / f"run-{runs}"
        step, last = None, min(kills, done + 3)
        while step != steps:  # a finished run can't be resumed
            moment = draw.uniform(0, life[name]) if done < last else None
            if not killed(start(out_dir, flags), moment):
                break
            done += 1
            step, cut = saved_step(out_dir), (out_dir / "new.tmp").exists()
            print(f"kill {done} after {moment:.2f} seconds, run {runs}, {name}, "
                  f"{'nothing saved' if step is None else f'saved at step {step}'}"
                  f"{', a file half written' * cut}", flush=True)
        left = outcome(out_dir)
        different = [file for file in left if left[file] != whole[name][file]]
        wrong += bool(different)
        print(f"run {runs} {'differs in ' + ', '.join(different) if different else 'is the same'}")
    print(f"{done} kills, {runs} runs, {wrong} of them different")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        different = kill_runs(args.kills, args.steps, args.seed, Path(folder), args.variants)
    sys.exit(different > 0)
