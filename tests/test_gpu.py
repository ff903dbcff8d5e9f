"""What only a GPU can show: CUDA graphs in training and in writing. Skipped where there is none."""
from dataclasses import replace

import pytest
import torch

import gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def on_gpu(config, text_file, tmp_path):
    """Train compiled on the GPU: on_gpu(name, resume, **changes) -> last val_loss."""
    def run(name, resume=False, **changes):
        plan = replace(config, **{"max_iters": 40, "eval_interval": 20} | changes)
        done = gpt.train(plan, text_file, tmp_path / name, resume, "cuda", compile="on")
        assert done["compiled"]
        return done["val_loss"]
    return run


def test_parts_of_a_batch_train_like_the_whole(on_gpu):
    parts = on_gpu("parts", gradient_accumulation_steps=2)
    assert parts == pytest.approx(on_gpu("whole"), abs=0.02)


def test_growing_windows_train(on_gpu):
    assert on_gpu("short", short_fraction=0.8) < 4


def test_a_recorded_text_is_the_plain_one(model):
    prompt = torch.randint(65, (2, 3), generator=torch.Generator().manual_seed(1))
    texts = [torch.cat([*gpt.generate(model.cuda(), prompt, 40, temperature=0, compile=fast)], 1)
             for fast in (False, True)]
    assert torch.equal(*texts)
