"""Row numbers and content hashes name the same sample whatever the padding and order."""

import pytest
import torch

from hf_fngd.hf.samples import (
    content_ids,
    fingerprint,
    packed_lengths,
)
from tests.hf_utils import EOS, PAD, pad_collator, tiny_marian, token_pairs


def ids_of(data, rows, **changes):
    return content_ids({**pad_collator([data[i] for i in rows]), **changes}, PAD)


def test_hash_ignores_padding_and_order():
    data = token_pairs(200)
    alone = {i: ids_of(data, [i])[0] for i in range(200)}
    assert len(set(alone.values())) == 200
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    for start in range(0, 200, 7):
        rows = order[start : start + 7]
        assert ids_of(data, rows) == [alone[i] for i in rows]


def test_hash_ignores_left_padding():
    row = token_pairs(1)[0]
    tokens = row["input_ids"]
    left = {
        "input_ids": torch.tensor([[PAD, PAD, *tokens]]),
        "attention_mask": torch.tensor([[0, 0, *[1] * len(tokens)]]),
        "labels": torch.tensor([row["labels"]]),
    }
    assert content_ids(left) == ids_of(token_pairs(1), [0])


def test_hash_sees_order_of_tokens_labels_and_single_changes():
    batch = pad_collator([token_pairs(1)[0]])
    plain = content_ids(batch)[0]
    flipped = content_ids({**batch, "input_ids": batch["input_ids"].flip(1)})[0]
    other_label = batch["labels"].clone()
    other_label[0, 0] += 1
    relabelled = content_ids({**batch, "labels": other_label})[0]
    swapped = content_ids({**batch, "input_ids": batch["labels"], "labels": batch["input_ids"]})[0]
    assert len({plain, flipped, relabelled, swapped}) == 4


def test_hash_without_labels_uses_decoder_inputs():
    data = token_pairs(2)
    batch = pad_collator([data[0], data[1]])
    model = tiny_marian()
    shifted = model.prepare_decoder_input_ids_from_labels(labels=batch.pop("labels"))
    wide = torch.nn.functional.pad(shifted, (0, 3), value=PAD)
    inputs = {**batch, "decoder_input_ids": shifted}
    # The first decoder token is the padding token itself; it carries no information.
    assert content_ids(inputs, PAD) == content_ids({**inputs, "decoder_input_ids": wide}, PAD)
    other = content_ids({**inputs, "decoder_input_ids": shifted.flip(0)}, PAD)
    assert content_ids(inputs, PAD) != other


def test_hash_of_shifted_labels_does_not_depend_on_the_longest_row():
    """Under label smoothing the model gets no labels, and the longest row loses its last token."""
    model, data = tiny_marian(), token_pairs(40)

    def smoothed(rows):
        batch = pad_collator([{**data[i], "labels": [*data[i]["labels"], EOS]} for i in rows])
        labels = batch.pop("labels")
        return {
            **batch,
            "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels),
        }

    alone = [content_ids(smoothed([i]), PAD, EOS)[0] for i in range(40)]
    assert content_ids(smoothed(range(40)), PAD, EOS) == alone
    assert len(set(alone)) == 40


def test_hash_of_images():
    pixels = torch.rand(5, 3, 4, 4)
    ids = content_ids({"pixel_values": pixels})
    assert len(set(ids)) == 5
    assert content_ids({"pixel_values": pixels.flip(0)}) == ids[::-1]
    assert all(-(2**63) <= i < 2**63 for i in ids)


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, i):
        return {"x": i * i}


def test_fingerprint_follows_content_not_transforms():
    data = token_pairs(20)
    same = token_pairs(20).with_transform(lambda rows: {"input_ids": rows["input_ids"]})
    assert fingerprint(data) == fingerprint(same)
    assert fingerprint(data) != fingerprint(token_pairs(20, seed=1))
    assert fingerprint(data) != fingerprint(token_pairs(19))
    assert fingerprint(Squares()) == "5 rows"


def test_every_input_with_a_row_for_each_sample_counts():
    rows = torch.Generator().manual_seed(0)
    boxes = torch.randint(0, 99, (12, 4, 4), generator=rows)
    waves = torch.randn(12, 7, generator=rows)
    documents = torch.randint(1, 50, (12, 6), generator=rows)
    same = torch.ones(12, 4, dtype=torch.long)
    for inputs in (
        {"attention_mask": torch.ones(12, 7).long(), "input_values": waves},
        {"input_ids": same, "bbox": boxes},
        {"query_ids": same, "doc_ids": documents, "labels": torch.zeros(12).long()},
        {"x": torch.ones(12, 3), "weight": torch.arange(12.0)},
    ):
        assert len(set(content_ids(inputs))) == 12, inputs.keys()


def test_inputs_without_a_row_for_each_sample_do_not_count():
    ids, patches = torch.arange(36).reshape(4, 9), torch.randn(64, 96)
    expected = content_ids({"input_ids": ids})
    assert content_ids({"input_ids": ids, "pixel_values": patches}) == expected
    assert content_ids({"input_ids": ids, "flags": torch.rand(4, 9) > 0.5}) == expected


@pytest.mark.parametrize("masked", [True, False])
def test_padding_of_further_inputs_is_ignored(masked):
    short = {"doc_ids": torch.tensor([[5, 6, 7], [8, 9, 0]])}
    wide = {"doc_ids": torch.tensor([[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]])}
    if masked:
        for one in (short, wide):
            one["attention_mask"] = (one["doc_ids"] > 0).long()
            one["token_type_ids"] = torch.ones_like(one["doc_ids"])
        wide["token_type_ids"][:, 3:] = 0
    assert content_ids(short) == content_ids(wide)
    assert len(set(content_ids(short))) == 2


def test_a_left_padded_row_is_one_sample():
    row = torch.tensor([[0, 0, 0, 5, 6, 7]])
    mask = (row > 0).long()
    positions = (mask.cumsum(1) - 1).clip(min=0)
    padded = {"input_ids": row, "attention_mask": mask, "position_ids": positions}
    assert packed_lengths(padded) is None
    # Without padding the same positions are those of packed samples.
    assert packed_lengths({"input_ids": row, "position_ids": positions}) == [1, 1, 1, 3]
