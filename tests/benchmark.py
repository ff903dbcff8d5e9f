"""Benchmarks of gpt.py, run by hand on a machine that does nothing else:

    python tests/benchmark.py                      # at the shape of nanoGPT's small example
    python tests/benchmark.py --peer ../nanoGPT    # beside the model.py of a nanoGPT checkout
    python tests/benchmark.py --only train start   # what has one of these words in its name
    python tests/benchmark.py --only target        # seconds until a validation loss is reached
    python tests/benchmark.py --table              # show again what the result file holds

Each repetition is a process of its own, so that none finds another's memory or threads, and the
measurements take turns (A B A B), so that noise hits them alike. The result file keeps all values
beside their conditions; a run replaces only what it measures."""
import argparse, hashlib, importlib, json, os, platform, re
import statistics, subprocess, sys, tempfile, time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt

ROOT = Path(gpt.__file__).parent
SHAPES = {"nanogpt": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16),
          "cpu": gpt.CPU,
          "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=2),
          "tiny": dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4)}  # for a try


def preset(device):
    """Where what `gpt.py train` takes on a device differs from Config's defaults."""
    return gpt.CPU if device.type == "cpu" else {}


def clock(device):
    """Seconds, once the device has done all that it was given."""
    getattr(torch, device.type).synchronize()
    return time.perf_counter()


def seconds_of(work, items, device):
    """Mean seconds of work(item)."""
    begin = clock(device)
    for item in items:
        work(item)
    return (clock(device) - begin) / len(items)


def count(model):
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


# ---- three models, and a training step of each ---------------------------------------------------
def classic_gpt(config):
    """The classic GPT: the classes of the notebook's chapter 6, whose cells run here. There it has
    ReLU; GPT-2 and nanoGPT have GELU, and so has this."""
    scope = {"torch": torch, "nn": nn, "F": F, "dataclass": dataclass, "V": config.vocab_size,
             "__name__": __name__}
    cells = json.loads((ROOT / "gpt_from_scratch.ipynb").read_text(encoding="utf-8"))["cells"]
    for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        if re.match(r"(@dataclass\n)?class Classic", source):
            exec(source, scope)
    shape = ("n_layer", "n_head", "n_embd", "block_size", "dropout")
    model = scope["ClassicGPT"](scope["Classic"](**{key: getattr(config, key) for key in shape}))
    for block in model.blocks:
        block.mlp[1] = nn.GELU()
    return model


def nano_gpt(config):
    """nanoGPT's GPT, from the model.py in --peer, without biases, as its train.py makes it."""
    module = importlib.import_module("model")
    shape = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "vocab_size")
    return module.GPT(module.GPTConfig(**{key: getattr(config, key) for key in shape}, bias=False))


def training_step(engine, config, device, dtype, data, compiled=False):
    """The model, a function that trains it for step i, and what was chosen. Three ways: gpt.py's
    own train_step, compiled as in gpt.train, on whole windows; the classic in float32 with plain
    AdamW; nanoGPT as in its train.py with config/train_shakespeare_char.py, on a CPU in float32."""
    if engine == "classic" or engine == "nanoGPT" and device.type == "cpu":
        dtype = torch.float32
    if engine == "gpt.py":
        config = replace(config, dtype=str(dtype)[6:], short_fraction=0.0)
        model = gpt.GPT(config).to(device)
        optimizers, compiled = gpt.make_optimizers(model, config), True
        try:
            for block in model.blocks:
                block.compile(dynamic=False)
            gpt.train_step(model, (), data, config, 0, 0)
        except Exception:  # as in gpt.train
            torch.compiler.set_stance("force_eager")
            compiled = False
    elif engine == "nanoGPT":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        model = nano_gpt(config).to(device)
        optimizers = [model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)]
    else:
        model = classic_gpt(config).to(device)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3)]
    forward = torch.compile(model) if compiled and engine == "nanoGPT" else model
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def step(i):
        if engine == "gpt.py":
            return gpt.train_step(model, optimizers, data, config, i, 0)
        x, y = gpt.get_batch(data, config.batch_size, config.block_size, i)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = (forward(x, y.contiguous())[1] if engine == "nanoGPT" else
                    F.cross_entropy(forward(x).flatten(0, 1), y.flatten()))
        scaler.scale(loss).backward()
        if engine == "nanoGPT":
            scaler.unscale_(optimizers[0])
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizers[0])
        scaler.update()
        model.zero_grad()

    return model, step, {
        "precision": str(dtype)[6:], "compiled": compiled,
        "optimizer": " and ".join(type(optimizer).__name__ for optimizer in optimizers)}


# ---- measurements: each returns figures, and conditions that only it knows -----------------------
def machine(config, device, dtype):
    """Ceiling of matrix products: the fastest of the model's own, and a large square one."""
    N, C = config.batch_size * config.block_size, config.n_embd
    large = 8192 if device.type == "cuda" else 2048
    sizes = {"of the model": [(N, C, C), (N, C, 3 * C), (N, C, 4 * C), (N, 4 * C, C)],
             "square": [(large, large, large)]}

    def speed(kind, n, k, m):
        x, weights = (torch.randn(rows, k, device=device, dtype=kind) for rows in (n, m))
        times = [seconds_of(lambda w: F.linear(x, w), [weights], device) for _ in range(20)]
        return 2 * n * k * m / min(times) / 1e9

    kinds = dict.fromkeys((torch.float32, dtype))
    if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        kinds[torch.bfloat16] = None  # also where it is slower, unless it is only emulated
    return {f"GFLOP/s {str(kind)[6:]}, {name}": max(speed(kind, *size) for size in sizes[name])
            for kind in kinds for name in sizes}, sizes


def train(config, device, dtype, engine, seconds, compiled=False):
    """Speed and peak memory of training steps, after three that don't count."""
    _, chars, data, _, _ = gpt.load_text()
    config, data = replace(config, vocab_size=len(chars)), data.to(device)
    begin = clock(device)
    model, step, found = training_step(engine, config, device, dtype, data, compiled)
    step(0)
    first = clock(device) - begin
    steps = max(2, round(seconds / seconds_of(step, range(2), device)))
    speed = config.batch_size * config.block_size / seconds_of(step, range(steps), device)
    # Model operations per token, by the convention of PaLM (Chowdhery et al., 2022, appendix B),
    # also that of nanoGPT's estimate_mfu: 6 for each parameter in a matrix product and 12 L C T for
    # attention, not halved for its mask; lookups and optimizers don't count. Half of the operations
    # of one character's way forward are such parameters (and 2 L C, 0.04 %, where PyTorch counts
    # fused attention).
    with (torch.no_grad(), torch.compiler.set_stance("force_eager"),
          FlopCounterMode(display=False) as counter):
        model.eval()(data[None, :1])
    cost = (3 * counter.get_total_flops() +
            12 * config.n_layer * config.n_embd * config.block_size)
    import resource  # here, since Windows has none
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes or KiB
    figures = {"tokens/s": speed, "model GFLOP/s": speed * cost / 1e9, "steps timed": steps,
               "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
               "s to build, compile, first step": first}
    if device.type == "cuda":
        figures["peak MiB on the GPU"] = torch.cuda.max_memory_allocated() / 2**20
    return figures, found | {"parameters": count(model), "MFLOP per token": round(cost / 1e6, 2)}


def profile(config, device, dtype, engine):
    """Where the time of a training step goes on a CPU: per cent in matrix products and in fused
    attention, forward and backward, in the optimizers, and in all the rest."""
    _, chars, data, _, _ = gpt.load_text()
    config = replace(config, vocab_size=len(chars))
    _, step, found = training_step(engine, config, device, dtype, data)
    for i in range(3):
        step(i)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for i in range(3, 8):
            with torch.profiler.record_function("step"):
                step(i)

    def in_optimizer(event):
        return event and ("Optimizer.step" in event.name or in_optimizer(event.cpu_parent))

    spent = dict.fromkeys(("step", "products", "optimizers"), 0)
    for event in profiler.events():
        if event.name == "step":
            spent["step"] += event.cpu_time_total
        elif "Optimizer.step" in event.name:
            spent["optimizers"] += event.cpu_time_total
        elif (re.fullmatch(r"aten::((ba)?(add)?b?mm|.*scaled_dot_product.*)", event.name)
              and not in_optimizer(event)):
            spent["products"] += event.self_cpu_time_total
    shares = {f"% in {name}": 100 * spent[name] / spent["step"] for name in [*spent][1:]}
    return shares | {"% in the rest": 100 - sum(shares.values())}, found


@torch.no_grad()
def generate(config, device, dtype, engine, past=1000, stride=8):
    """Characters per second within the window and past it, random weights, float32. Without a
    cache, a character costs what its context costs: one at every `stride`-th length is timed."""
    B, T = config.batch_size, config.block_size
    model = nano_gpt(config) if engine == "nanoGPT" else gpt.GPT(config)
    model = model.to(device).eval()
    text = torch.randint(config.vocab_size, (B, T)).to(device)

    def one_more(idx):
        if engine == "nanoGPT":
            return model.generate(idx, 1)
        if engine != "gpt.py, uncached":
            return next(gpt.generate(model, idx, 1, temperature=1.0))
        return torch.multinomial(model(idx)[:, -1].softmax(-1), 1)

    seconds_of(one_more, [text] * 3, device)
    first = [seconds_of(one_more, [text[:, :n]] * 5, device) for n in (1, T)]
    if engine == "gpt.py, cached":
        stream = gpt.generate(model, text[:, :1], T - 1 + past, temperature=1.0)
        counts = T - 1, past
        within, beyond = (seconds_of(lambda _: next(stream), range(n), device) for n in counts)
    else:
        contexts = [text[:, :n] for n in range(stride // 2, T, stride)]
        counts = len(contexts), len(contexts)
        within = seconds_of(one_more, contexts, device)
        beyond = seconds_of(one_more, [text] * len(contexts), device)
    return {"tokens/s within": B / within, "tokens/s past": B / beyond,
            "ms to first, prompt of 1": 1000 * first[0],
            "ms to first, prompt fills window": 1000 * first[1]}, {
            "timed within and past, per text": counts, "precision": "float32"}


def start(config, device, dtype):
    """Seconds of a process that imports gpt and loads a checkpoint, and of `import torch` alone."""
    def run(code):
        subprocess.run([sys.executable, "-c", code], check=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "best.pt")
        torch.save({"config": asdict(config), "chars": "".join(map(chr, range(65))),
                    "states": [gpt.GPT(config).state_dict()]}, path)
        load = f"import gpt; gpt.load({str(path)!r}, '{device}')"
        return {"s import torch": seconds_of(run, ["import torch"], device),
                "s import gpt and load": seconds_of(run, [load], device)}, {}


def trained(config, device, minutes):
    """`python gpt.py train` with its preset: its run.json and what else is to be known of it, its
    wall seconds, and the wall seconds at which it reported each step."""
    begin, log, told = time.perf_counter(), [], {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "gpt.py", "train", "--device", device.type, "--out_dir", folder,
                   "--minutes", str(minutes), "--seed", str(config.seed)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stderr:
                log.append(line)
                if line.startswith("step "):
                    told[int(line[5:line.index(",")])] = time.perf_counter() - begin
        if process.returncode:
            sys.exit("".join(log))
        wall, run = time.perf_counter() - begin, json.loads(Path(folder, "run.json").read_text())
        del run["config"]["out_dir"]
        return run, {"parameters": count(gpt.load(Path(folder, "last.pt"))[0]),
                     "precision": run["config"]["dtype"],
                     "compiled": not any("torch.compile fails" in line for line in log),
                     "sha256 of the text": run["fixed"][-1][:8]}, wall, told


def target(config, device, dtype, loss, minutes):
    """Wall seconds of a training, and until it reports `loss` or less over the whole validation
    split. Minutes 0: the steps of the preset. The seed is that of the repeat."""
    run, found, wall, told = trained(config, device, minutes)
    reached = [told[row["step"]] for row in run["metrics"] if row["val_loss"] <= loss]
    return {"s to target": reached[0] if reached else None, "s in all": wall, "steps": run["step"],
            "last val loss": run["val_loss"],
            "best val loss": min(row["val_loss"] for row in run["metrics"]),
            "evaluations": len(run["metrics"])}, found | {"config": run["config"]}


# ---- taking turns, and showing what was found ----------------------------------------------------
KINDS = {f.__name__: f for f in (machine, train, profile, generate, start, target)}
WORDS = {"n_layer": "layers", "n_head": "heads", "n_embd": "channels", "block_size": "context",
         "batch_size": "batch", "dropout": "dropout"}


def plan(args, device):
    """{name: (kind, config, options)} of the measurements asked for."""
    timed, config = {"seconds": args.seconds}, gpt.Config(**preset(device) | SHAPES[args.shape])
    batch = 64 if device.type == "cuda" else config.batch_size
    rows = [("machine", "", batch, 0.0, {}), ("start", "", batch, 0.0, {})]
    rows += [("train", engine, batch, dropout, timed) for engine, dropout in (
        ("gpt.py", config.dropout), ("gpt.py", 0.2), ("classic", 0.2))]
    rows += [("train", "nanoGPT", size, dropout, timed | {"compiled": compiled})
             for size, dropout in ((64, 0.2), (batch, 0.2), (batch, 0.0))
             for compiled in (False, True)]
    if device.type == "cpu":  # kernels on a GPU run later than Python starts them
        rows += [("profile", "gpt.py", batch, config.dropout, {})]
    rows += [("generate", engine, size, 0.0, {}) for size in (1, 16)
             for engine in ("gpt.py, cached", "gpt.py, uncached", "nanoGPT")]
    jobs = {}
    for kind, engine, size, dropout, options in rows:
        label = f": {engine}, batch {size}, dropout {dropout}" if engine else ""
        label += ", compiled" if options.get("compiled") else ""
        if engine != "nanoGPT" or args.peer:
            jobs[f"{kind} {args.shape}{label}"] = (
                kind, replace(config, batch_size=size, dropout=dropout),
                options | ({"engine": engine} if engine else {}))
    if args.only:  # these take minutes a run, so they must be asked for; their shape: the preset
        budget = gpt.Config(**preset(device))
        time_given = f"in {args.minutes:g} minutes" if args.minutes else "with the preset's steps"
        jobs[f"target: {args.target} {time_given}"] = (
            "target", budget, {"loss": args.target, "minutes": args.minutes})
    return {name: job for name, job in jobs.items() if any(w in name for w in args.only or [""])}


def device_name(device):
    """The GPU, or the CPU and the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", about.read_text() if about.exists() else "")
    units = " with AMX" if torch.cpu.get_capabilities().get("amx_bf16") else ""
    return f"{(names or [platform.processor()])[0]}{units}, {os.cpu_count()} cores"


def summary(values):
    """Median, least, most and all values. If a target was missed (None), only the values."""
    values = [v and float(f"{v:.6g}") for v in values]
    return {f.__name__: None if None in values else f(values)
            for f in (statistics.median, min, max)} | {"values": values}


SHOWN = {"machine": [], "start": [],  # all their figures
         "train": ["engine", "batch", "dropout", "precision", "compiled", "tokens/s",
                   "model GFLOP/s", "peak MiB"],
         "profile": ["engine", "batch", "dropout", "precision", "compiled", "% in products",
                     "% in optimizers", "% in the rest"],
         "generate": ["engine", "batch", "tokens/s within", "tokens/s past",
                      "ms to first, prompt of 1"],
         "target": ["minutes", "parameters", "seeds", "s to target", "s of steps to target",
                    "steps", "last val loss", "commit"]}


def tables(document):
    """Markdown tables of a result file: medians, and in brackets the range of the repetitions."""
    def cell(value):
        if not isinstance(value, dict):
            return str(value)
        few = ["missed" if v is None else f"{v:,.0f}" if v >= 100 else f"{v:.4g}"
               for v in (value["median"], value["min"], value["max"])]
        if "missed" in few:
            return ", ".join("missed" if v is None else f"{v:.0f}" for v in value["values"])
        return few[0] if few[1] == few[2] else f"{few[0]} ({few[1]} to {few[2]})"

    text = ""
    for device, entries in document.items():
        groups = {}  # one table for each kind and shape
        for name, e in entries.items():
            groups.setdefault(name.partition(":")[0], []).append(e["conditions"] | e["figures"])
        for label in sorted(groups, key=lambda label: [*SHOWN].index(label.split()[0])):
            rows, columns = groups[label], SHOWN[label.split()[0]]
            columns = columns or [key for key in rows[0] if isinstance(rows[0][key], dict)]
            lines = [columns, ["---"] * len(columns),
                     *([cell(row.get(key, "")) for key in columns] for row in rows)]
            text += f"\n{label}, {device}:\n\n"
            text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", type=os.path.abspath, help="folder of a nanoGPT checkout")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each measurement")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the repeats")
    parser.add_argument("--shape", choices=SHAPES, default="nanogpt", help="of the models")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training to be timed")
    parser.add_argument("--only", nargs="+", help="words, one of which a name must have")
    parser.add_argument("--target", type=float, default=1.4697, help="validation loss to reach")
    parser.add_argument("--minutes", type=float, default=2.5, help="of each such run; 0: steps")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/benchmarks.json")
    parser.add_argument("--table", action="store_true", help="show the result file and end")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # one measurement, in JSON
    args, device = parser.parse_args(), gpt.pick_device()
    if args.worker:
        kind, config, options, peer = json.loads(args.worker)
        sys.path += [peer] * bool(peer)
        torch.manual_seed(config["seed"])
        result = KINDS[kind](gpt.Config(**config), device, gpt.pick_dtype(device), **options)
        print("\n" + json.dumps(result))
        return 0
    jobs, values, seeds, failed = {} if args.table else plan(args, device), {}, {}, 0
    shared = {"threads": torch.get_num_threads(), "torch": torch.__version__,
              "compiler cache": "empty",
              "date": time.strftime("%Y-%m-%d")}
    for turn in range(args.repeats):
        seed = args.seeds[turn % len(args.seeds)]
        for name, (kind, config, options) in jobs.items():
            print(f"{time.strftime('%H:%M:%S')} {turn + 1}: {name}", file=sys.stderr)
            job = json.dumps([kind, asdict(replace(config, seed=seed)), options, args.peer])
            with tempfile.TemporaryDirectory() as cache:  # compile anew, as a first run has to
                done = subprocess.run([sys.executable, Path(__file__).resolve(), "--worker", job],
                                      cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                      env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache})
            if done.returncode:
                print(f"failed: {name}", file=sys.stderr)
                failed += 1
                continue
            figures, found = json.loads(done.stdout.splitlines()[-1])
            seeds.setdefault(name, []).append(seed)
            for figure, value in figures.items():
                values.setdefault(name, {}).setdefault(figure, []).append(value)
            source = Path(args.peer, "model.py") if "nanoGPT" in name else ROOT / "gpt.py"
            code = {"code": hashlib.sha256(source.read_bytes()).hexdigest()[:8],
                    "seeds": seeds[name]}
            shape = {word: getattr(config, key) for key, word in WORDS.items()}
            document = json.loads(args.out.read_text()) if args.out.exists() else {}
            document.setdefault(device_name(device), {})[name] = {
                "conditions": shape | options | found | code | shared,
                "figures": {figure: summary(them) for figure, them in values[name].items()}}
            args.out.write_text(json.dumps(document, indent=1))
    print(tables(json.loads(args.out.read_text()) if args.out.exists() else {}))
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())
