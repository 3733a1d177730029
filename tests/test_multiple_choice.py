"""Questions with several answers to choose from: for language models, and for models with a head that chooses."""

from __future__ import annotations

from typing import Any

import datasets
import models
import pytest
import torch
import transformers

import mats_hub
from mats_hub.errors import StatisticsError
from mats_hub.source import open_source
from mats_hub.statistics.collect import IGNORED
from mats_hub.statistics.dataset import Columns
from mats_hub.statistics.tasks import open_task
from mats_hub.suite import Suite

WORDS = ["good", "dull", "liked"]
TOLD: dict[str, dict[str, Any]] = {
    # As data sets of the Hub have them; the second choice is right.
    "MMLU": {"question": "it was", "choices": WORDS, "answer": 1},
    "ARC": {"question": "it was", "choices": {"text": WORDS, "label": ["1", "2", "3"]}, "answerKey": "2"},
    "OpenBookQA": {"question_stem": "it was", "choices": {"text": WORDS, "label": ["A", "B", "C"]}, "answerKey": "B"},
    "a list of rows": {"question": "it was", "choices": [{"label": n, "text": t} for n, t in zip("xyz", WORDS, strict=True)],
                       "answer": "y"},
    "HellaSwag": {"ctx": "it was", "endings": WORDS, "label": "1"},
    "PIQA": {"goal": "it was", "sol1": "good", "sol2": "dull", "label": 1},
    "Winogrande": {"sentence": "it was", "option1": "good", "option2": "dull", "answer": "2"},
    "SWAG": {"sent1": "it", "sent2": "was", "ending0": "good", "ending1": "dull", "ending2": "it", "label": 1},
    "RACE": {"article": "it", "question": "was", "options": WORDS, "answer": "B"},
    "letters": {"input": "it was", "A": "good", "B": "dull", "C": "it", "target": "B"},
    "the text itself": {"prompt": "it was", "options": WORDS, "answer": " dull"},
    "P3": {"inputs_pretokenized": "it was", "answer_choices": WORDS, "targets_pretokenized": "\ndull"},
}  # fmt: skip


def opened(folder, *rows: dict[str, Any], columns: Columns = Columns()) -> tuple[Any, Any]:  # noqa: B008
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    data = open_task(
        config.architectures[0], config, [open_source(folder)], datasets.Dataset.from_list([*rows]), columns
    )
    return model, data


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models.tiny_llama(root / "llama")
    models.tiny_t5(root / "t5")
    models.tiny_bert("BertForMultipleChoice", root / "bert")
    return root


@pytest.mark.parametrize("name", TOLD)
def test_the_right_choice_is_what_is_said(name, folders):
    _, data = opened(folders / "llama", TOLD[name])
    batch = next(data.batches(1))
    assert data.tokenizer.decode(batch["labels"][batch["labels"] != IGNORED]).split() == ["dull", "</s>"]
    assert data.tokenizer.decode(batch["input_ids"][0]).split() == ["<s>", "it", "was", "dull", "</s>"]
    _, data = opened(folders / "t5", TOLD[name])
    assert data.tokenizer.decode(next(data.batches(1))["labels"][0]).split() == ["dull", "</s>"]
    _, data = opened(folders / "bert", TOLD[name])
    batch = next(data.batches(1))
    assert batch["labels"].tolist() == [1]
    assert data.tokenizer.decode(batch["input_ids"][0, 1], skip_special_tokens=True).split() == ["it", "was", "dull"]


QUESTIONS = [
    {"question": text, "choices": [*models.tiny_texts(2, seed, 1, 3), "it", "very good film"]}
    for seed, text in enumerate(models.tiny_texts(6))
]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_language_model_chooses_the_likeliest_by_the_mean_over_its_tokens(name, folders):
    model, data = opened(folders / name, *[row | {"answer": 0} for row in QUESTIONS])
    likeliest = []
    for row in QUESTIONS:
        losses = []
        for choice in row["choices"]:
            if name == "t5":
                asked, said = data.tokenizer(row["question"]).input_ids, data.tokenizer(text_target=choice).input_ids
                inputs = {"input_ids": torch.tensor([asked]), "labels": torch.tensor([said])}
            else:
                ids = data.tokenizer(f"{row['question']}\n{choice}").input_ids
                ids += [] if ids[-1] == data.tokenizer.eos_token_id else [data.tokenizer.eos_token_id]
                begin = len(ids) - len(choice.split()) - 1
                inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([[IGNORED] * begin + ids[begin:]])}
            with torch.no_grad():
                losses.append(float(model(**inputs).loss))
        likeliest.append(losses.index(min(losses)))
    assert len(set(likeliest)) > 1
    wrong = [index in (1, 4) for index in range(len(QUESTIONS))]
    rows = [row | {"answer": (place + miss) % 4} for row, place, miss in zip(QUESTIONS, likeliest, wrong, strict=True)]
    for size in (1, 5, 64):
        score = mats_hub.evaluate(
            folders / name, dataset=datasets.Dataset.from_list(rows), batch_size=size, device="cpu"
        )
        assert score == pytest.approx(4 / 6)


def test_a_head_that_chooses_is_measured_as_each_example_alone(folders):
    """The pooler reads every choice's first token; what padding is there does not count."""
    rows = [row | {"answer": index % 4} for index, row in enumerate(QUESTIONS)]
    model, data = opened(folders / "bert", *rows)
    gradients, gram = torch.zeros_like(model.classifier.weight), 0
    read = []
    hook = model.bert.encoder.layer[0].attention.self.query.register_forward_pre_hook(lambda _, x: read.append(x[0]))
    for row in rows:
        logits = []
        for choice in row["choices"]:
            one = data.tokenizer(row["question"], choice, return_tensors="pt")
            logits.append(model(**{key: value[None] for key, value in one.items()}).logits[0, 0])
            gram = gram + read[-1][0].T @ read[-1][0]
        loss = torch.nn.functional.cross_entropy(torch.stack(logits)[None], torch.tensor([row["answer"]]))
        gradients += torch.autograd.grad(loss, model.classifier.weight)[0] ** 2
    hook.remove()
    found = mats_hub.compute_statistics(
        folders / "bert", dataset=datasets.Dataset.from_list(rows), kind=["gram", "fisher"], device="cpu", batch_size=4
    )
    assert found.provenance.task == "multiple-choice"
    assert found.provenance.columns == {"text": ("question",), "label": "answer", "choices": ("choices",)}
    torch.testing.assert_close(found.tensor("classifier.weight.fisher").float(), gradients, rtol=1e-4, atol=1e-7)
    seen = torch.zeros(models.VOCABULARY)
    for row in rows:
        for choice in row["choices"]:
            seen += torch.bincount(
                data.tokenizer(row["question"], choice, return_tensors="pt").input_ids[0], minlength=len(seen)
            )
    assert found.tensor("bert.embeddings.word_embeddings.input_counts").equal(seen)
    name = "bert.encoder.layer.0.attention.self.query.input_gram"
    torch.testing.assert_close(found.tensor(name).float(), gram.detach(), rtol=1e-4, atol=1e-6)
    assert 0 <= mats_hub.evaluate(folders / "bert", dataset=datasets.Dataset.from_list(rows), device="cpu") <= 1


def test_choices_that_cannot_be_read_are_refused_and_texts_that_are_named_are_read_alone(folders):
    row = {"question": "it was", "choices": WORDS, "answer": 1}
    for change, match in (
        ({"answer": 3}, r"3 in column 'answer' tells none of 3 choices: .* 0 to 2"),
        ({"answer": "E"}, "'E' in column 'answer'"),
        ({"choices": ["good"]}, r"columns 'choices' hold .* two texts or more .*--choices"),
    ):
        _, data = opened(folders / "llama", row | change)
        with pytest.raises(StatisticsError, match=match):
            next(data.batches(1))
        with pytest.raises(StatisticsError, match=match):
            mats_hub.evaluate(folders / "llama", dataset=data.dataset, device="cpu")
    assert opened(folders / "llama", row, columns=Columns(("question",)))[1].task.name == "causal-lm"
    given = {"asked": "it was", "one": "good", "other": "dull", "which": 1}
    _, data = opened(folders / "llama", given, columns=Columns(("asked",), "which", choices=("one", "other")))
    assert data.tokenizer.decode(next(data.batches(1))["input_ids"][0]).split()[-2:] == ["dull", "</s>"]
    with pytest.raises(StatisticsError, match=r"cannot tell which column is the right choice; name it with --label"):
        opened(folders / "llama", given, columns=Columns(("asked",), choices=("one", "other")))


def test_a_file_of_tasks_names_the_columns_of_choices(folders, tmp_path):
    rows = [
        {"asked": "it was", "one": "good", "other": "good", "which": place} for place in (0, 0, 0, 1)
    ]  # the first wins
    datasets.Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    entry = {"validation": "rows.jsonl", "test": "rows.jsonl", "text": "asked", "label": "which"}
    suite = Suite.from_mapping({"asking": entry | {"choices": ["one", "other"]}}, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama")
    assert suite.score("asking", "test", model, folders / "llama", "cpu") == 0.75
