"""Tables, links and cards of the pages agree with the code and with the committed results."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from matplotlib.testing.compare import compare_images

from tests.pages import PAGES, ROOT
from tests.report.card_rules import faults_of
from tests.scripts.script_utils import script

# Page, and what a link of it says: a path from the page's folder, an anchor, or both.
LINKS = sorted(
    {(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^):]+)\)", text)}
)


def test_tables_are_those_of_the_code_and_the_result_files():
    with script(ROOT / "scripts" / "tables.py") as tables:
        for page, text in PAGES.items():
            assert tables.fill(text) == text, f"{page}: run python scripts/tables.py"
        marks = set(re.findall(r"<!-- end of (\w+) -->", "".join(PAGES.values())))
        assert tables.TABLES.keys() <= marks, "a table that no page shows"


def test_front_picture_is_that_of_the_committed_runs(tmp_path):
    with script(ROOT / "scripts" / "front_picture.py") as program:
        program.draw(tmp_path / "front.png")
        difference = compare_images(program.PATH, tmp_path / "front.png", tol=10)
    assert difference is None, "run python scripts/front_picture.py"


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short(page):
    assert len(PAGES[page].splitlines()) <= (220 if page == "README.md" else 250)


def test_table_of_what_works_names_tests_that_exist():
    rows = re.findall(
        r"^\| (.+) \| (works|slower|refused).* \| `([\w/]+)::(\w+)` \| .*\|$",
        PAGES["tests/README.md"],
        re.M,
    )
    assert len(rows) > 30 and len({feature for feature, *_ in rows}) == len(rows)
    for _, _, file, test in rows:
        source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", source, re.M)


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_to_files_and_headings(page, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
        known = {re.sub(r"[^\w -]", "", one).strip().lower().replace(" ", "-") for one in headings}
        assert anchor in known


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda p: p.name)
def test_cards_are_what_the_code_makes_of_the_numbers(folder, tmp_path, monkeypatch):
    # With the other cards, which it may be compared with.
    everything = tmp_path / "model_cards"
    shutil.copytree(folder.parent, everything, ignore=shutil.ignore_patterns("README.md"))
    own = everything / folder.name
    monkeypatch.chdir(ROOT)
    with script(ROOT / "scripts" / "write_card.py") as program:
        assert program.main([str(own)]) == 0
    for path in folder.iterdir():
        assert (own / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda p: p.name)
def test_cards_repeat_their_metrics_file(folder):
    found = json.loads((folder / "metrics.json").read_text())
    card = (folder / "README.md").read_text(encoding="utf-8")
    translates = "source_lang" in found["settings"]["data"]
    names = ("bleu", "chrf") if translates else ("accuracy",)
    split, prefix = ("test", "test") if "test" in found else ("validation", "eval")
    scores = {name: found[split][f"{prefix}_{name}"] for name in names}
    digits = 2 if translates else 4
    cells = " | ".join(f"{value:.{digits}f}" for value in scores.values())
    assert f"| this model | {cells} |" in card
    assert f"On the {split} set" in card and found["environment"]["command"] in card
    assert f"| learning_rate | {found['settings']['training']['learning_rate']} |" in card
    assert not translates or split != "test" or found["test"]["bleu_signature"] in card
    # What the Hub reads of it, by the Hub's own parser.
    data = ModelCard(card).data
    results = {r.metric_type: (r.metric_value, r.dataset_split) for r in data.eval_results}
    assert results == {name: (round(value, 4), split) for name, value in scores.items()}
    assert data.model_name == folder.name and data.base_model is None
    assert faults_of(data.to_dict()) == []
    assert data.pipeline_tag == ("translation" if translates else "image-classification")
    assert {path.name for path in folder.glob("*.png")} == set(re.findall(r"\]\((.*\.png)\)", card))


@pytest.mark.parametrize(
    ("folder", "baseline"),
    [
        ("multi30k-finetune-fngd", "multi30k-finetune-sgd"),
        ("cifar10-resnet18-small-fngd", "cifar10-resnet18-small-sgd"),
    ],
)
def test_cards_of_fngd_and_of_its_baseline_name_each_other(folder, baseline):
    cards = ROOT / "model_cards"
    for one, other, optim in ((folder, baseline, "plain"), (baseline, folder, "fngd")):
        test = json.loads((cards / other / "metrics.json").read_text())["test"]
        score = f"{test['bleu']:.2f}" if "bleu" in test else f"{test['test_accuracy']:.4f}"
        card = (cards / one / "README.md").read_text(encoding="utf-8")
        assert re.search(rf"^\| `--optim {optim}`, [^|]* \| {score} \|", card, re.M)
