"""Every method with every update rule, and torch's optimizers and test database beside them."""

import copy

import torch
from torch import nn
from torch.testing._internal.common_optimizers import optim_db

from hf_fngd.methods import METHODS

# The import above forbids all tests to set flags of torch.backends, unless this is undone.
torch.backends.__allow_nonbracketed_mutation_flag = True

RULES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "muon": torch.optim.Muon}
INFOS = {rule: next(i for i in optim_db if i.optim_cls is kind) for rule, kind in RULES.items()}
# Preconditioning comes before the rule, whichever it is: three methods stand for all of them.
EVERY_RULE = ("plain", "fngd", "kfac")
ROWS = [
    f"{method}-{rule}"
    for method in METHODS
    for rule in (RULES if method in EVERY_RULE else ["sgd"])
]
LR, SAMPLES = 0.05, 4


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4)
    return nn.Sequential(*layers).to(dtype)


def make(model, row, params=None, lr=LR, **settings):
    method, rule = row.split("-")
    params = model.parameters() if params is None else params
    settings = {"update_scale": "none"} | settings
    return METHODS[method](params, lr, module=model, update_rule=rule, **settings)


def torch_optimizer(group, params, **options):
    """Return torch's optimizer for the settings of one of our groups."""
    rule = group["rule"]
    own = {
        "sgd": {"momentum": group["momentum"]},
        "muon": {"momentum": group["momentum"], "weight_decay": group["weight_decay"]},
        "adamw": {
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            # On a CPU; for complex numbers there is no such kernel.
            "fused": not any(p.is_complex() for p in params),
        },
    }[rule]
    return RULES[rule](params, **{"lr": copy.deepcopy(group["lr"])} | own | options)


def torchs(optimizer, model, twin):
    """Return torch's optimizers over a copy of the model, one for each of our groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    theirs = dict(twin.named_parameters())
    return [
        torch_optimizer(group, [theirs[names[id(p)]] for p in group["params"]])
        for group in optimizer.param_groups
    ]


def give_gradients(*models, seed=0):
    """Set the same random gradients, as if backward had: no method then changes them."""
    for model in models:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)


def train(model, optimizer, steps=3, first=0):
    """Make steps of an ordinary loop; the batch of a step depends on its number only."""
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        x = torch.randn(SAMPLES, 6).to(next(model.parameters()))
        optimizer.set_batch(range(SAMPLES))
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def equal(first, second):
    """Compare two models bit for bit."""
    for name, value in first.state_dict().items():
        torch.testing.assert_close(
            second.state_dict()[name], value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
