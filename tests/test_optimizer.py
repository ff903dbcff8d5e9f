from dataclasses import replace

import pytest
import torch

import gpt


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_muon_follows_torchs_muon(shape):
    torch.manual_seed(0)
    start = torch.randn(3, *shape)
    mine, theirs = ([torch.nn.Parameter(m.clone()) for m in start] for _ in range(2))
    ours = gpt.Muon([{"params": mine}], dict(lr=0.02, weight_decay=0.3, momentum=0.95))
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.95)
    for _ in range(10):
        for a, b in zip(mine, theirs):
            a.grad = b.grad = torch.randn(shape)
        ours.step()
        reference.step()
    for a, b, begin in zip(mine, theirs, start):
        assert (a - b).norm() < 0.02 * (a - begin).norm()  # theirs computes in bfloat16


def test_orthogonalize_levels_the_singular_values():
    torch.manual_seed(0)
    for shape in ((2, 20, 60), (2, 60, 20)):
        values = torch.linalg.svdvals(gpt.orthogonalize(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3


def test_zero_gradient_is_no_accident():
    assert torch.equal(gpt.orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_every_parameter_has_one_optimizer(config):
    model = gpt.GPT(config)
    muon, adamw = ([p for group in optimizer.param_groups for p in group["params"]]
                   for optimizer in gpt.make_optimizers(model, config))
    assert sorted(map(id, muon + adamw)) == sorted(map(id, model.parameters()))
    assert set(map(id, muon)) == set(map(id, model.blocks.parameters()))


def test_embedding_and_head_decay_without_a_gradient(config):
    torch.manual_seed(0)
    model = gpt.GPT(replace(config, adamw_weight_decay=2.0))
    torch.nn.init.normal_(model.head.weight)
    tables = [*model.embeddings.parameters(), model.head.weight]
    before = [p.detach().clone() for p in tables]
    for p in tables:
        p.grad = torch.zeros_like(p)
    gpt.make_optimizers(model, model.config)[1].step()
    for p, old in zip(tables, before):
        torch.testing.assert_close(p, old * (1 - config.adamw_learning_rate * 2.0))
