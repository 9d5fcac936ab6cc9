"""A new method is one class and one line, a new layer type likewise; imports go one way."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_fngd
from hf_fngd.capture import LayerMethod
from hf_fngd.config import OptimizerConfig
from hf_fngd.layers import TYPES, LayerType
from hf_fngd.layers.calls import gather_calls
from hf_fngd.methods import OPTIMIZERS, create_preconditioned_optimizer
from hf_fngd.optimizer import LayerOptimizer
from tests.helpers import natural_gradient, sample_gradients

PACKAGE = Path(hf_fngd.__file__).parent
# From the ground up: a module may import from its own floor and from those before it.
FLOORS = [
    ("errors", "ranks", "scale", "solve", "states"),
    ("config", "layers", "rules", "soap"),
    ("capture",),
    ("ownership",),
    ("optimizer",),
    ("methods",),
    ("hf",),
    ("report",),
]


# ---- a toy method: each sample's gradient has unit length --------------------------------------


class UnitLayer(LayerMethod):
    def gradients(self, batch, calls, bias):
        a, g = gather_calls(self.kind, calls)
        u = g.transpose(2, 3) @ a
        norms = torch.linalg.vector_norm(u, dim=(0, 2, 3), keepdim=True)
        weight = self.kind.from_canonical((u / norms).sum(1), calls[0].weight)
        return weight, (g / norms).sum((0, 1, 2)) if bias else None


class UnitConfig(OptimizerConfig):
    title = "unit"


class Unit(LayerOptimizer):
    config_class = UnitConfig
    layer_class = UnitLayer
    method = "unit"

    def statistics(self):
        return {**super().statistics(), "steps": float(self.steps)}


def test_a_method_is_one_class_and_one_line(monkeypatch):
    # The line in METHODS makes this one when the package is imported.
    monkeypatch.setitem(OPTIMIZERS, "unit", (Unit, {}))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    optimizer = create_preconditioned_optimizer(model, method="unit", lr=0.1)

    expected = {}
    twin = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    twin.load_state_dict(model.state_dict())
    for index in (0, 2):
        weight = twin[index].weight
        rows = [
            torch.autograd.grad(
                nn.functional.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]), weight
            )
            for i in range(5)
        ]
        expected[index] = sum(u / u.norm() for (u,) in rows)

    nn.functional.cross_entropy(model(x), y).backward()
    for index, direction in expected.items():
        torch.testing.assert_close(model[index].weight.grad, direction, rtol=1e-10, atol=1e-12)
    optimizer.step()
    assert optimizer.statistics() == {"layers": 2.0, "layers_dropped": 0.0, "steps": 1.0}

    # Checkpoints and detaching come with the base class.
    resumed = create_preconditioned_optimizer(model, method="unit", lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.steps == 1
    resumed.detach()
    assert type(model[0]) is nn.Linear


# ---- a toy layer type: one factor for each feature ---------------------------------------------


class Scale(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))
        self.bias = nn.Parameter(torch.randn(features))

    def forward(self, x):
        return x * self.weight + self.bias


class ScaleType(LayerType):
    """Each feature is a channel group with one input and one output."""

    def forward(self, x, weight, bias):
        return x * weight + bias

    def input_gradient(self, g, x, weight):
        return g * weight

    def gradients(self, g, x, weight, bias):
        return (g * x).flatten(0, -2).sum(0), self.bias_gradient(g) if bias else None

    def bias_gradient(self, g):
        return g.flatten(0, -2).sum(0)

    def canonical(self, x, g):
        n, d = x.shape[0], x.shape[-1]
        a, b = (part.reshape(n, -1, d).permute(2, 0, 1).unsqueeze(-1) for part in (x, g))
        return a, b

    def to_canonical(self, gradient):
        return gradient.reshape(-1, 1, 1)

    def scale(self, g, gamma):
        return g * gamma.to(g.dtype).reshape(len(g), *[1] * (g.dim() - 1))


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4)], ids=["rows", "sequences"])
def test_a_layer_type_is_one_class_and_one_line(monkeypatch, shape):
    monkeypatch.setitem(TYPES, Scale, ScaleType)
    model = nn.Sequential(Scale(4), nn.Tanh()).double()
    x = torch.randn(shape).double()

    def share(i):
        return model(x[i : i + 1]).square().sum() / len(x)

    parameters = [model[0].weight, model[0].bias]
    expected = natural_gradient(sample_gradients(share, parameters, len(x)), 0.3)
    optimizer = create_preconditioned_optimizer(
        model, method="fngd", lr=0.1, share="none", damping=0.3, damping_mode="absolute"
    )
    assert list(optimizer.selection.chosen) == ["0"]
    (model(x).square().sum() / len(x)).backward()
    for parameter, direction in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, direction, rtol=1e-10, atol=1e-12)

    # In a later epoch the stored number weights the same gradients.
    optimizer = create_preconditioned_optimizer(model, method="fngd", lr=0.0, share="layer")
    optimizer.set_batch(range(len(x)))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.start_epoch(1)
    optimizer.set_batch(range(len(x)))
    model(x).square().sum().backward()
    gamma = float(optimizer.coefficients()[0, 0])
    captured = [parameter.grad.clone() for parameter in parameters]
    optimizer.detach()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    assert 0 < gamma < 1
    for parameter, weighted in zip(parameters, captured, strict=True):
        torch.testing.assert_close(weighted, gamma * parameter.grad, rtol=1e-6, atol=1e-9)


# ---- arrows ------------------------------------------------------------------------------------


def imports():
    """(floor of the importing module, imported name) for every import inside the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                yield "/".join(parts), name


def floor(name):
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def test_imports_go_one_way():
    seen = 0
    for module, name in imports():
        if name.startswith("hf_fngd."):
            seen += 1
            here, there = module.split("/")[0], name.split(".")[1]
            # `from hf_fngd import FNGD` is the public face, for reports only.
            if there[0].isupper() or there.startswith("create_"):
                assert here == "report", (module, name)
            else:
                assert floor(there) <= floor(here), f"{module} imports {name}"
    assert seen > 100


def test_no_module_imports_itself_through_others():
    paths = {
        ".".join(("hf_fngd", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in PACKAGE.rglob("*.py")
    }
    graph = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # Imports for annotations only are not run.
        tree.body = [one for one in tree.body if "TYPE_CHECKING" not in ast.unparse(one)[:20]]
        found = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
            for name in (node.module, f"{node.module}.{alias.name}")
        }
        graph[module] = found & paths.keys() - {"hf_fngd", module}
    assert sum(map(len, graph.values())) > 80
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_only_hf_and_report_import_transformers():
    rooms = {
        module.split("/")[0]
        for module, name in imports()
        if name.split(".")[0] in ("transformers", "accelerate", "datasets", "huggingface_hub")
    }
    assert rooms == {"hf", "report"}


def test_the_core_works_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'transformers' else find(name, *a)\n"
        "import torch, hf_fngd\n"
        "model = torch.nn.Linear(2, 2)\n"
        "optimizer = hf_fngd.create_fngd_optimizer(model, lr=0.1)\n"
        "optimizer.set_batch([0, 1]); model(torch.randn(2, 2)).sum().backward(); optimizer.step()\n"
        "assert not hasattr(hf_fngd, 'FNGDTrainer')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
