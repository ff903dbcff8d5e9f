from dataclasses import replace

import torch

import gpt


def test_muon_follows_torchs_muon():
    torch.manual_seed(0)
    start = torch.randn(3, 24, 16)
    mine = torch.nn.Parameter(start.clone())
    theirs = [torch.nn.Parameter(m.clone()) for m in start]
    ours = gpt.Muon([mine], lr=0.02, weight_decay=0.3)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.95)
    for _ in range(10):
        mine.grad = torch.randn(3, 24, 16)
        for p, grad in zip(theirs, mine.grad):
            p.grad = grad.clone()
        ours.step()
        reference.step()
    path = (mine - start).norm()
    assert (mine - torch.stack(list(theirs))).norm() < 0.02 * path  # theirs computes in bfloat16


def test_orthogonalize_levels_the_singular_values():
    torch.manual_seed(0)
    for shape in ((2, 20, 60), (2, 60, 20)):
        values = torch.linalg.svdvals(gpt.orthogonalize(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3


def test_zero_gradient_is_no_accident():
    assert torch.equal(gpt.orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_every_parameter_has_one_optimizer(config):
    model = gpt.GPT(config)
    owned = [p for optimizer in gpt.make_optimizers(model, config)
             for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))


def test_embedding_and_head_decay_without_a_gradient(config):
    torch.manual_seed(0)
    model = gpt.GPT(replace(config, adamw_weight_decay=2.0))
    torch.nn.init.normal_(model.head)
    tables = [model.embedding, model.head]
    before = [p.detach().clone() for p in tables]
    for p in tables:
        p.grad = torch.zeros_like(p)
    gpt.make_optimizers(model, model.config)[1].step()
    for p, old in zip(tables, before):
        torch.testing.assert_close(p, old * (1 - config.adamw_learning_rate * 2.0))


def test_more_minutes_choose_larger_models():
    shapes = [gpt.preset("cpu", minutes).get("n_embd") for minutes in (0, 14.9, 15, 29.9, 30)]
    assert shapes == [128, 128, 192, 192, 256]
    decays = [gpt.preset("cpu", minutes)["weight_decay"] for minutes in (0, 6.9, 7, 14.9)]
    assert decays == [0.1, 0.1, 0.15, 0.15]
    assert gpt.preset("cuda", 60) == gpt.preset("mps") == gpt.PRESETS["gpu"]
    for shape in gpt.PRESETS.values():
        gpt.Config(**shape)
