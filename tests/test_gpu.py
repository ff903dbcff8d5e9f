"""What only a GPU can show: its number formats, its compiler, its text. Skipped without one."""
import pytest
import torch

import gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def on_gpu(train, capsys):
    """Train on the GPU: on_gpu(name, **changes) -> last val_loss."""
    def run(name, **changes):
        run, _ = train(name, device="cuda", max_iters=40, eval_interval=20, **changes)
        assert "fails here" not in capsys.readouterr().err
        return run["val_loss"]
    yield run
    torch.compiler.set_stance("default")  # where compiling failed


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_each_number_format_learns_what_float32_does_on_the_cpu(on_gpu, train, dtype):
    expected = train("cpu", max_iters=40, eval_interval=20)[0]
    assert expected["val_loss"] < expected["metrics"][0]["val_loss"] < 4
    assert on_gpu(dtype, dtype=dtype) == pytest.approx(expected["val_loss"], abs=0.05)


@pytest.mark.parametrize("dtype, short_fraction", [("float32", 0.0), ("float32", 0.8),
                                                   ("float16", 0.0), ("bfloat16", 0.8)])
def test_compiled_training_is_the_plain_one(on_gpu, dtype, short_fraction):
    compiled, plain = (on_gpu(how, compile=how, dtype=dtype, short_fraction=short_fraction)
                       for how in ("on", "off"))
    assert compiled == pytest.approx(plain, abs=0.01 if dtype == "float32" else 0.05)


def test_a_run_from_the_gpu_writes_the_same_text_on_gpu_and_cpu(train):
    _, folder = train("run", device="cuda", dtype="bfloat16", max_iters=40)
    texts = []
    for device in ("cpu", "cuda"):
        model, _ = gpt.load(folder / "best.pt", device)
        assert model.head.weight.device.type == device
        written = gpt.generate(model, torch.zeros(2, 3).long(), 60, temperature=0)
        texts.append(torch.cat([*written], dim=1))
    assert torch.equal(*texts)
