"""The model card says what the run reported, and leaves alone what a person wrote."""

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_fngd.report.card import CardFacts, CardMixin, write_card
from tests.hf_utils import arguments, make_trainer
from tests.report.card_rules import faults_of

FACTS = CardFacts(
    model_name="marian-small",
    task="translation",
    dataset="Tatoeba sample",
    languages=["en", "de"],
    optimizer="fngd",
    settings={"damping": 0.1, "share": "sample"},
    layers="layer  decision\nfc1    chosen",
    command="python scripts/run_translation.py scripts/demo.json",
    seed=3,
    device="one CPU",
    versions={"torch": "2.13.0"},
    metrics={"bleu": 12.345678, "chrf": 34.5},
    baselines={"adamw_torch, same command": {"bleu": 11.0, "chrf": 30.0}},
    signatures={"bleu": "nrefs:1|case:mixed"},
    curves="curves.png",
    limits=["One seed."],
)


def test_front_matter_is_valid_and_holds_the_results(tmp_path):
    card = ModelCard.load(write_card(tmp_path, FACTS))
    data = card.data
    assert data.language == ["en", "de"] and data.pipeline_tag == "translation"
    assert {"fngd", "natural-gradient", "hf_fngd"} <= set(data.tags)
    assert data.base_model is None
    found = {r.metric_type: (r.metric_value, r.dataset_name) for r in data.eval_results}
    assert found == {"bleu": (12.3457, "Tatoeba sample"), "chrf": (34.5, "Tatoeba sample")}
    assert data.model_name == "marian-small"


@pytest.mark.parametrize(
    "text",
    [
        "python scripts/run_translation.py scripts/demo.json",
        "seed 3",
        "one CPU",
        "torch 2.13.0",
        "| share | sample |",
        "fc1    chosen",
        "| this model | 12.35 | 34.50 |",
        "| adamw_torch, same command | 11.00 | 30.00 |",
        "`nrefs:1|case:mixed`",
        "![loss and scores](curves.png)",
        "- One seed.",
        "arXiv:2403.03473",
        "AutoModelForSeq2SeqLM.from_pretrained",
        "Run `import hf_fngd` before you load `training_args.bin`",
    ],
)
def test_text_says(text, tmp_path):
    assert text in write_card(tmp_path, FACTS).read_text()


def test_any_metric_is_shown_under_its_own_name(tmp_path):
    facts = replace(FACTS, metrics={"meteor": 0.51239, "wer": 12.0}, baselines={}, further={})
    card = ModelCard.load(write_card(tmp_path, facts))
    assert "| | meteor | wer |\n|---|---:|---:|\n| this model | 0.5124 | 12.00 |\n" in card.text
    found = {r.metric_type: (r.metric_name, r.metric_value) for r in card.data.eval_results}
    assert found == {"meteor": ("meteor", 0.5124), "wer": ("wer", 12.0)}


def test_pattern_does_not_break_the_table_of_settings(tmp_path):
    facts = replace(FACTS, settings={"target_modules": ".*(fc1|fc2)"})
    text = write_card(tmp_path, facts).read_text()
    assert "\n| setting | value |\n|---|---|\n| target_modules | .*(fc1\\|fc2) |\n\n" in text
    assert "Settings" not in write_card(tmp_path, replace(FACTS, settings={})).read_text()


def test_template_is_text_and_not_html(tmp_path):
    text = write_card(tmp_path, replace(FACTS, dataset="<A> & 'B'")).read_text()
    assert "on <A> & 'B' with" in text and "\n\n\n" not in text


def test_writing_again_changes_nothing(tmp_path):
    first = write_card(tmp_path, FACTS).read_text()
    assert write_card(tmp_path, FACTS).read_text() == first


def test_numbers_of_a_new_run_replace_the_old_ones(tmp_path):
    write_card(tmp_path, FACTS)
    text = write_card(tmp_path, replace(FACTS, metrics={"bleu": 20.0})).read_text()
    assert "20.00" in text and "12.3" not in text
    assert [r.metric_value for r in ModelCard(text).data.eval_results] == [20.0]


def test_hand_written_card_is_completed(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "---\nlicense: mit\nlanguage: en\ntags:\n- mine\n---\n\n# My model\n\nWhat I say of it.\n"
    )
    text = write_card(tmp_path, FACTS).read_text()
    data = ModelCard(text).data
    assert data.license == "mit" and data.language == "en"
    assert data.tags[0] == "mine" and "fngd" in data.tags
    assert "# My model\n\nWhat I say of it." in text and "12.35" in text
    again = write_card(tmp_path, FACTS).read_text()
    assert again == text and text.count("hf_fngd: begin") == 1
    path.write_text(text + "\nA last word.\n")
    assert write_card(tmp_path, FACTS).read_text().endswith("A last word.\n")


@pytest.mark.parametrize(
    ("base", "named"), [("Helsinki-NLP/opus-mt-en-de", True), ("{folder}", False), (None, False)]
)
def test_base_model_is_named_only_if_it_is_on_the_hub(base, named, tmp_path):
    base = base and base.format(folder=tmp_path)
    card = ModelCard.load(write_card(tmp_path, replace(FACTS, base_model=base)))
    assert (card.data.base_model == base) == (named or base is None)
    assert ("local checkpoint" in card.text) == (base is not None and not named)


def test_local_model_that_was_fine_tuned_is_named_but_is_no_base_model(tmp_path):
    card = ModelCard.load(write_card(tmp_path, replace(FACTS, local_base="first", train_rows=2000)))
    assert card.data.base_model is None
    assert "from a local model, `first`, on Tatoeba sample (2,000 rows) with" in card.text


def test_scores_of_further_test_sets_are_in_the_table_alone(tmp_path):
    baselines = {"sgd": {"bleu": 11.0, "bleu_2017": 8.5}}
    facts = replace(FACTS, further={"bleu_2017": 9.25}, baselines=baselines)
    card = ModelCard.load(write_card(tmp_path, facts))
    assert "| | bleu | chrf | bleu_2017 |\n" in card.text
    assert "| this model | 12.35 | 34.50 | 9.25 |\n| sgd | 11.00 |  | 8.50 |" in card.text
    assert {result.metric_type for result in card.data.eval_results} == {"bleu", "chrf"}


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (["en_XX", "de_DE"], ["en", "de"]),
        (["eng_Latn", "deu_Latn"], ["eng", "deu"]),
        (["pt-BR", "pt"], ["pt"]),
        (["English"], None),
    ],
)
def test_languages_are_codes_that_the_hub_takes(codes, expected, tmp_path):
    data = ModelCard.load(write_card(tmp_path, replace(FACTS, languages=codes))).data
    assert data.language == expected and faults_of(data.to_dict()) == []


def test_faults_of_metadata_are_found():
    good = {"language": ["en"], "base_model": "a/b", "tags": ["fngd"]}
    assert faults_of(good) == [] and faults_of("a") == ["metadata"]
    bad = {"language": ["en_XX"], "base_model": "/some/path", "tags": [1]}
    assert faults_of(bad) == ["language", "base_model", "tags"]
    result = {"task": {"type": "a"}, "dataset": {"name": "b"}, "metrics": [{"value": 1}]}
    assert faults_of({"model-index": [{"results": [result]}]}) == ["model-index"]


def test_unmeasured_model_claims_no_results(tmp_path):
    text = write_card(tmp_path, replace(FACTS, metrics={}, baselines={})).read_text()
    assert "## Results" not in text and "test set" not in text
    assert not ModelCard(text).data.eval_results and "## How it was trained" in text


def test_scores_name_the_data_they_are_of(tmp_path):
    text = write_card(tmp_path, replace(FACTS, test_dataset="test.jsonl")).read_text()
    assert "On the test set: test.jsonl." in text and "trained on Tatoeba sample" in text
    assert {r.dataset_name for r in ModelCard(text).data.eval_results} == {"test.jsonl"}


def test_scores_of_a_validation_set_are_not_those_of_a_test(tmp_path):
    facts = replace(FACTS, dataset_id="someone/pairs", split="validation")
    text = write_card(tmp_path, facts).read_text()
    assert "On the validation set: Tatoeba sample." in text and "test set" not in text
    assert {r.dataset_split for r in ModelCard(text).data.eval_results} == {"validation"}
    assert not (tmp_path / ".eval_results").exists()


def test_data_of_the_hub_are_named_and_get_their_eval_results(tmp_path):
    write_card(tmp_path, replace(FACTS, dataset_id=str(tmp_path)))
    assert not (tmp_path / ".eval_results").exists(), "a folder is no data set of the Hub"
    facts = replace(FACTS, dataset_id="someone/pairs", dataset_config="en-de")
    data = ModelCard.load(write_card(tmp_path, facts)).data
    assert data.datasets == ["someone/pairs"]
    assert {r.dataset_type for r in data.eval_results} == {"someone/pairs"}
    (written,) = yaml.safe_load((tmp_path / ".eval_results" / "pairs.yaml").read_text())
    (entry,) = parse_eval_result_entries([written])
    assert (entry.dataset_id, entry.task_id, entry.value) == ("someone/pairs", "en-de", 12.3457)
    assert entry.notes == "bleu; chrf 34.5; bleu: nrefs:1|case:mixed"


def test_baseline_run_has_no_fngd_tags(tmp_path):
    text = write_card(tmp_path, replace(FACTS, optimizer="adamw_torch")).read_text()
    assert not {"fngd", "natural-gradient"} & set(ModelCard(text).data.tags)
    assert "2403.03473" not in text and "import hf_fngd" not in text


def test_trainer_writes_this_card_once_facts_are_known(tmp_path):
    from transformers import Seq2SeqTrainer

    class Mine(CardMixin, Seq2SeqTrainer):
        pass

    trainer = make_trainer(Mine, arguments(tmp_path, max_steps=1))
    trainer.train()
    trainer.create_model_card()
    assert "hf_fngd: begin" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    trainer.card_facts = FACTS
    trainer.create_model_card(model_name="ignored")
    assert "12.35" in (tmp_path / "README.md").read_text()


def test_use_of_a_model_that_wants_a_prefix(tmp_path):
    text = write_card(tmp_path, replace(FACTS, prefix='say "de": ')).read_text()
    assert r'tokenizer("say \"de\": A text.", return_tensors="pt")' in text


def test_card_of_an_image_classifier(tmp_path):
    changes = {"task": "image-classification", "metrics": {"accuracy": 0.91234}, "signatures": {}}
    facts = replace(FACTS, languages=[], baselines={}, **changes)
    text = write_card(tmp_path, facts).read_text()
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_type, result.metric_name) == ("accuracy", "Accuracy")
    assert "| this model | 0.9123 |" in text and "Tokenizer" not in text and "nrefs" not in text
    assert "AutoImageProcessor.from_pretrained(folder)\n" in text
    assert "AutoModelForImageClassification.from_pretrained(folder)\n" in text
    text = write_card(tmp_path, replace(facts, custom_code=True)).read_text()
    assert "AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)" in text
