"""What only a GPU can show: CUDA graphs in training and in writing. Skipped where there is none."""
from dataclasses import replace

import pytest
import torch

import gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def on_gpu(config, text_file, tmp_path):
    """Train on the GPU in float32: on_gpu(name, compile, **changes) -> last val_loss."""
    def run(name, compile="on", **changes):
        plan = replace(config, max_iters=40, eval_interval=20, **changes)
        done = gpt.train(plan, text_file, tmp_path / name, False, "cuda", "float32", compile)
        assert done["compiled"] == (compile == "on")
        return done["val_loss"]
    return run


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2},
                                     {"short_fraction": 0.8}], ids=["whole", "parts", "short"])
def test_compiled_training_is_the_plain_one(on_gpu, changes):
    compiled, plain = (on_gpu(how, how, **changes) for how in ("on", "off"))
    assert compiled == pytest.approx(plain, abs=0.01)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_a_recorded_text_is_the_plain_one(model, shape, compiles):
    prompt = torch.randint(65, shape, generator=torch.Generator().manual_seed(1)).cuda()
    before = prompt.clone()
    texts = [torch.cat([*gpt.generate(model.cuda(), prompt, 40, temperature=0, compile=fast)], 1)
             for fast in (False, True)]
    assert torch.equal(*texts) and torch.equal(prompt, before)
