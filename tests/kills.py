"""Kill a training run at random moments, resume it, and compare it with one that was left alone.

    python tests/kills.py --kills 20

Each run trains the same tiny model on the bundled play. It is killed by SIGKILL at a moment drawn
from the whole life of a process, start-up and saving included, goes on with --resume (from the
start, if nothing had been saved), and may be killed again. When it comes to its end before a
moment that was drawn, its files are compared with those of the run left alone: weights, state of
the optimizers and everything else but times bit for bit, and generated text. Then the next run
starts, until all kills are done. One line for each kill; exit status 1 if anything differs."""
import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import gpt  # noqa: E402

FLAGS = ["--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--block_size", 64, "--batch_size", 4,
         "--dropout", 0.2, "--eval_interval", 10]


def start(out_dir, steps):
    """A process that trains in out_dir from where the last one came to."""
    words = ["train", "--out_dir", out_dir, "--compile", "off", "--device", "cpu"]
    if (out_dir / "last.pt").exists():
        words += ["--resume"]
    else:
        shutil.rmtree(out_dir, ignore_errors=True)  # a best.pt alone would be refused
        words += ["--data", ROOT / gpt.BUNDLED, "--max_iters", steps, *FLAGS]
    return subprocess.Popen([sys.executable, ROOT / "gpt.py", *map(str, words)],
                            stderr=subprocess.PIPE, text=True)


def killed(process, seconds):
    """Whether SIGKILL ended a process, rather than its own end. Raises if it ended badly."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    _, said = process.communicate()
    if process.returncode in (0, -9):
        return process.returncode != 0
    raise RuntimeError(f"a run ended with status {process.returncode}:\n{said}")


def plain(value):
    """A value that == compares in every bit, without what the clock decides."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if "second" not in str(key)}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.shape, value.contiguous().numpy().tobytes()
    return repr(value)


def text(checkpoint):
    """What a checkpoint generates."""
    model, tokenizer, _ = gpt.load(checkpoint, "cpu")
    idx = tokenizer.encode("\n").long()[None]
    return tokenizer.decode(int(i) for i in gpt.generate(model, idx, 100))


def outcome(out_dir):
    """All that a run has left, by file."""
    found = {name: plain(torch.load(out_dir / name, weights_only=True))
             for name in ("last.pt", "best.pt")}
    rows = (out_dir / "metrics.jsonl").read_text().splitlines()
    return found | {"metrics.jsonl": [plain(json.loads(row)) for row in rows],
                    "run.json": plain(json.loads((out_dir / "run.json").read_text())),
                    "text": text(out_dir / "best.pt") + text(out_dir / "last.pt")}


def saved_step(out_dir):
    last = out_dir / "last.pt"
    return torch.load(last, weights_only=True)["step"] if last.exists() else None


def kill_runs(kills, steps, seed, folder):
    """Number of runs that differ from the one left alone, after so many kills."""
    draw, begin = random.Random(seed), time.perf_counter()
    killed(start(folder / "whole", steps), None)
    life, whole = time.perf_counter() - begin, outcome(folder / "whole")
    print(f"left alone: {steps} steps, {life:.1f} seconds")
    done = runs = wrong = 0
    while done < kills:
        runs += 1
        out_dir = folder / f"run-{runs}"
        while True:
            moment = draw.uniform(0, life) if done < kills else None
            if not killed(start(out_dir, steps), moment):
                break
            done += 1
            step, cut = saved_step(out_dir), len(list(out_dir.glob("*.tmp")))
            print(f"kill {done} after {moment:.2f} seconds, run {runs}, "
                  f"{'nothing saved' if step is None else f'saved at step {step}'}"
                  f"{', files half written so far: ' * bool(cut)}{cut or ''}", flush=True)
        left = outcome(out_dir)
        different = [name for name in whole if left[name] != whole[name]]
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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(kill_runs(args.kills, args.steps, args.seed, Path(folder)) > 0)
