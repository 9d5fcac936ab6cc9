"""The gain of a direction on another batch is that of the dense Gauss-Newton matrix."""

import pytest
import torch

from tests.helpers import tiny_marian
from tests.hf.test_runner import ROOT
from tests.scripts.script_utils import script


@pytest.fixture(scope="module")
def study():
    with script(ROOT / "scripts/direction_quality.py") as module:
        yield module


@pytest.fixture(scope="module")
def problem():
    """A model, a batch with padding, and the gradient and Gauss-Newton matrix of one layer."""
    torch.manual_seed(0)
    model = tiny_marian().double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(20)
    tokens = torch.randint(3, 20, (3, 5))
    labels = torch.randint(3, 20, (3, 4))
    labels[0, 2:] = -100
    inputs = {"input_ids": tokens, "labels": labels}
    (name, weight), *_ = [
        (n, p) for n, p in model.named_parameters() if "decoder.layers.0.fc2.weight" in n
    ]

    def logits(value):
        found = torch.func.functional_call(model, {name: value}, kwargs=inputs).logits
        return found[labels != -100]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(logits, weight.detach()).flatten(2)
    chances = logits(weight).softmax(-1)
    mixed = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    matrix = torch.einsum("tci,tcd,tdj->ij", jacobian, mixed, jacobian) / len(chances)
    slope = study_slope(model, inputs)[weight]
    return model, inputs, weight, matrix.detach(), slope


def study_slope(model, inputs):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(**inputs).loss, parameters, allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def test_curvature_is_the_dense_one_and_the_weights_stay(study, problem):
    model, inputs, weight, matrix, _ = problem
    before = weight.detach().clone()
    for seed in range(3):
        step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).double()
        flat = step.flatten()
        found = study.curvature(model, [(weight, step)], inputs)
        assert found == pytest.approx(float(flat @ matrix @ flat), rel=1e-4)
    assert torch.equal(weight, before)


def test_no_direction_gains_more_than_newtons(study, problem):
    model, inputs, weight, matrix, slope = problem
    slopes = study.slopes(model, inputs)
    assert torch.equal(slopes[id(weight)], slope)
    damped = matrix + 1e-9 * matrix.trace() * torch.eye(len(matrix))
    newton = -torch.linalg.solve(damped, slope.flatten()).view_as(weight)
    best = study.gain(model, [(weight, newton)], slopes, inputs)
    expected = float((slope * newton).sum()) ** 2 / float(
        newton.flatten() @ matrix @ newton.flatten()
    )
    assert best == pytest.approx(expected / 2, rel=1e-3)
    # The length of a direction does not matter, and uphill there is nothing to gain.
    assert study.gain(model, [(weight, 7 * newton)], slopes, inputs) == pytest.approx(
        best, rel=1e-3
    )
    assert study.gain(model, [(weight, -newton)], slopes, inputs) == 0
    # A parameter outside the graph neither moves nor counts.
    idle = torch.nn.Parameter(torch.zeros(2)), torch.zeros(2)
    assert study.gain(model, [(weight, newton), idle], slopes, inputs) == pytest.approx(best)
    plain = study.gain(model, [(weight, -slope)], slopes, inputs)
    assert 0 < plain < best


def test_ratio_and_error_are_those_of_paired_batches(study):
    values, base = [2.0, 4.0, 6.5], [1.0, 2.0, 3.0]
    ratio, error = study.relative(values, base)
    assert ratio == pytest.approx(12.5 / 6)
    assert study.relative([2 * one for one in base], base) == (2, 0)
    rest = torch.tensor([v - ratio * b for v, b in zip(values, base, strict=True)])
    assert error == pytest.approx(float(rest.std()) / (2 * 3**0.5))


def test_directions_leave_the_model_as_it_was(study, problem):
    model, inputs, *_ = problem

    class Data:
        def __init__(self):
            self.model = model

        def batches(self, seed):
            while True:
                yield torch.arange(3), inputs

    before = [p.detach().clone() for p in model.parameters()]
    hidden = study.directions(Data(), {"method": "muon_soap"}, True, 0, 3)
    others = study.directions(Data(), {"method": "muon_soap"}, False, 0, 3)
    assert len(hidden) == len(others) == 2
    moved = [{id(p) for p, _ in one[0]} for one in (hidden, others)]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert not moved[0] & moved[1] and moved[0] | moved[1] == trained
    assert all(float(step.norm()) > 0 for _, step in hidden[1] if step.dim() > 1)
    assert all(map(torch.equal, before, model.parameters()))
