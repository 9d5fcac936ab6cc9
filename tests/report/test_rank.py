"""`python -m hf_fngd rank`: effective ranks by the definition, of changes and of adapters."""

import itertools
import json
import math
import operator
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from hf_fngd import FNGDError
from hf_fngd.report.rank import Spectrum, allocate, main, spectra
from tests.hf_utils import tiny_marian, weights

# Of PEFT, while it makes an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def matrix(*values, shape=(7, 5)):
    """A random matrix with these singular values."""
    left, right = (torch.linalg.qr(torch.randn(n, n))[0] for n in shape)
    return left[:, : len(values)] @ torch.diag(torch.tensor(values)) @ right[: len(values)]


def folder(path, **tensors):
    path.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (5, 5)])
def test_the_definition(shape, tmp_path):
    values = (4.0, 2.0, 1.0, 1.0)
    place = folder(tmp_path / "a", **{"fc.weight": matrix(*values, shape=shape)})
    (found,) = spectra(place)
    expected = math.exp(-sum(v / 8 * math.log(v / 8) for v in values))
    assert found.layer == "fc" and found.shape == shape
    assert found.effective_rank == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        found.values[:4], torch.tensor(values).double(), rtol=1e-5, atol=1e-6
    )
    # Of 22 parts of the squared norm: 16, 4, 1, 1.
    ranks = {0.5: 1, 0.72: 1, 0.74: 2, 0.9: 2, 0.93: 3, 0.99: 4}
    assert {share: found.rank(share) for share in ranks} == ranks


def test_equal_singular_values_have_the_whole_rank(tmp_path):
    place = folder(tmp_path / "a", fc=torch.eye(6), zero=torch.zeros(4, 4))
    fc, zero = spectra(place)
    assert fc.effective_rank == pytest.approx(6) and fc.rank(0.5) == 3 and fc.rank(0.999) == 6
    assert zero.effective_rank == zero.rank(0.9) == 0


@pytest.mark.parametrize("planted", [1, 2, 4])
def test_the_rank_of_a_change(planted, tmp_path):
    start = {"a.weight": torch.randn(7, 5), "b.weight": torch.randn(6, 3, 2, 2)}
    change = torch.randn(7, planted) @ torch.randn(planted, 5)
    end = {"a.weight": start["a.weight"] + change, "b.weight": start["b.weight"]}
    # What is no matrix, or not in both, has no rank.
    end |= {"norm.weight": torch.ones(5), "new.weight": torch.randn(3, 3)}
    places = [folder(tmp_path / name, **some) for name, some in (("0", start), ("1", end))]
    a, b = spectra(places[1], places[0])
    assert [a.layer, b.layer] == ["a", "b"] and b.shape == (6, 12)
    assert a.rank(1 - 1e-9) == planted and b.rank(0.9) == 0
    expected = torch.linalg.svdvals(change.double())
    torch.testing.assert_close(a.values, expected, rtol=1e-4, atol=1e-4)


def test_a_saved_model_in_parts_and_whole(tmp_path):
    model = tiny_marian()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 1
    whole, parts = (spectra(tmp_path / name, match=r"fc|proj") for name in ("whole", "parts"))
    assert [one.layer for one in whole] == [one.layer for one in parts] and len(whole) == 16
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.values, other.values)
        expected = torch.linalg.svdvals(model.get_submodule(one.layer).weight.detach().double())
        torch.testing.assert_close(one.values, expected, rtol=1e-5, atol=1e-7)


def test_an_adapter_is_a_change(tmp_path, capsys):
    config = LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    model = get_peft_model(tiny_marian(), config)
    model.save_pretrained(tmp_path / "adapter")
    found = {one.layer: one for one in spectra(tmp_path / "adapter")}
    before = weights(tiny_marian())
    merged = dict(model.merge_and_unload().named_parameters())
    assert len(found) == 5 and max(one.rank(0.999) for one in found.values()) <= 4
    for layer, one in found.items():
        change = merged[f"{layer}.weight"].detach() - before[f"{layer}.weight"]
        expected = torch.linalg.svdvals(change.double())
        ratio = expected / expected.sum()
        torch.testing.assert_close(one.values / one.values.sum(), ratio, rtol=1e-3, atol=1e-4)
    with pytest.raises(FNGDError, match="is an adapter, which is a change: leave --base out"):
        spectra(tmp_path / "adapter", tmp_path)


def test_the_command_writes_what_peft_reads(tmp_path, capsys):
    before, after = tiny_marian(), tiny_marian()
    with torch.no_grad():
        for number, layer in enumerate(("encoder.layers.0.fc1", "decoder.layers.0.fc2"), start=2):
            weight = after.model.get_submodule(layer).weight
            weight += torch.randn(len(weight), number) @ torch.randn(number, weight.shape[1])
    for name, model in (("before", before), ("after", after)):
        model.save_pretrained(tmp_path / name)
    pattern = tmp_path / "ranks.json"
    words = [tmp_path / "after", "--base", tmp_path / "before", "--share", "0.99999"]
    picture = tmp_path / "ranks.png"
    files = ["--rank_pattern", str(pattern), "--plot", str(picture)]
    main([*map(str, words), "--match", "fc[12]$", *files])
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert told.startswith("| layer ") and "for the median layer and 3 at most" in told
    ranks = json.loads(pattern.read_text())
    assert ranks["model.encoder.layers.0.fc1"] == 2 and ranks["model.decoder.layers.0.fc2"] == 3
    assert ranks["model.encoder.layers.0.fc2"] == 1, "a LoRA has at least rank 1"
    adapted = get_peft_model(
        before, LoraConfig(r=8, target_modules="all-linear", rank_pattern=ranks)
    )
    for layer, rank in ranks.items():
        module = adapted.base_model.model.get_submodule(layer)
        assert module.lora_A["default"].weight.shape[0] == rank


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_keeps_the_most(seed):
    """Against all ways to share out the parameters of a LoRA of rank 2."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(4, 4), (4, 4), (4, 4)] if seed % 2 else [(4, 4), (2, 6), (5, 3)]
    found = [
        Spectrum(
            name, shape, torch.rand(min(shape), generator=random).double().sort().values.flip(0)
        )
        for name, shape in zip("abc", shapes, strict=True)
    ]
    ranks = allocate(found, 2)
    costs = [8, 8, 8]

    def kept(chosen):
        return sum(
            float(one.values[:r].square().sum()) for one, r in zip(found, chosen, strict=True)
        )

    ways = itertools.product(*(range(1, min(shape) + 1) for shape in shapes))
    possible = [way for way in ways if sum(map(operator.mul, way, costs)) <= 2 * sum(costs)]
    best = max(possible, key=kept)
    assert tuple(ranks.values()) == best and list(ranks) == ["a", "b", "c"]


def test_a_budget_counts_the_parameters_of_each_layer():
    wide = [Spectrum("a", (4, 4), torch.ones(4)), Spectrum("b", (4, 400), torch.ones(4))]
    assert allocate(wide, 2) == {"a": 4, "b": 1}, "a rank of b costs fifty times one of a"
    assert allocate(wide, 1) == {"a": 1, "b": 1}


def bad(tmp_path):
    good = folder(tmp_path / "good", **{"fc.weight": torch.randn(4, 3)})
    other = folder(tmp_path / "other", **{"fc.weight": torch.randn(5, 3)})
    broken = folder(tmp_path / "broken", **{"fc.weight": torch.full((4, 3), math.nan)})
    (tmp_path / "empty").mkdir()
    cut = folder(tmp_path / "cut", **{"fc.weight": torch.randn(4, 3)}) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    index = tmp_path / "index"
    index.mkdir()
    (index / "model.safetensors.index.json").write_text("[]")
    return {
        "no folder": ([tmp_path / "none"], "there is no model.safetensors"),
        "no weights": ([tmp_path / "empty"], "give the folder of a model or adapter"),
        "another model": ([good, "--base", other], r"\[4, 3\] in .* and \[5, 3\] in"),
        "not finite": ([broken], "not finite: is the training broken"),
        "cut": ([cut.parent], "cannot read .*model.safetensors"),
        "no index": ([index], "is not an index of weights"),
        "no match": ([good, "--match", "attention"], "no matrix of .* fits --match 'attention'"),
        "no pattern": ([good, "--match", "("], "is not a regular expression"),
        "share": ([good, "--share", "1"], "--share must lie between 0 and 1, not 1"),
        "no place": ([good, "--rank_pattern", tmp_path], "--rank_pattern: cannot write"),
        "no rank": ([good, "--budget", "0", "--rank_pattern", tmp_path / "a"], "--budget must be"),
        "no file": ([good, "--budget", "4"], "--budget must be .* needs --rank_pattern FILE"),
        "no picture": ([good, "--plot", tmp_path / "no/a.png"], "--plot: cannot write"),
    }


CASES = ("no folder", "no weights", "another model", "not finite", "cut", "no index", "no match",
         "no pattern", "share", "no place", "no picture",
         "no rank", "no file")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(case, tmp_path, capsys):
    cases = bad(tmp_path)
    assert set(cases) == set(CASES)
    words, message = cases[case]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if "error:" in s]
    assert re.search(message, line)
