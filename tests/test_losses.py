"""Losses and labels: what statistics of gradients are measured against, for every kind of head and of label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import models
import pytest
import torch
import transformers
from test_loading import tiny_whisper
from tokenizers import ByteLevelBPETokenizer

import mats_hub
from mats_hub.errors import ResourceError, StatisticsError
from mats_hub.source import open_source
from mats_hub.statistics.collect import IGNORED
from mats_hub.statistics.dataset import Columns
from mats_hub.statistics.task_data import TaskData
from mats_hub.statistics.tasks import open_task

TEXTS = models.tiny_texts(6, 1, shortest=3)
TEMPLATE = (
    "{% for m in messages %}{{ '[CLS] ' if m['role'] == 'user' else '<s> ' }}{{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> {% endif %}"
)


def task_of(folder: Path, rows: dict[str, list[Any]], needs_labels: bool = True) -> tuple[Any, TaskData]:
    config = transformers.AutoConfig.from_pretrained(folder)
    name = config.architectures[0]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    data = datasets.Dataset.from_dict(rows)
    return model, open_task(name, config, [open_source(folder)], data, Columns(), needs_labels=needs_labels)


HEADS: dict[str, tuple[dict[str, Any], list[Any], Any]] = {
    # name: config, labels, the loss of one example from its logits and its label
    "one label of three": (
        {"labels": 3},
        [0, 1, 2, 1, 0, 2],
        lambda z, y: torch.nn.functional.cross_entropy(z, torch.tensor(y)),
    ),
    "regression": (
        {"labels": 1, "problem_type": "regression"},
        [0.5, -1.0, 2.0, 0.0, 1.5, -0.5],
        lambda z, y: (z[0] - y).square(),
    ),
    "several labels, as zeros and ones": (
        {"labels": 3, "problem_type": "multi_label_classification"},
        [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]],
        lambda z, y: torch.nn.functional.binary_cross_entropy_with_logits(z, torch.tensor(y, dtype=torch.float32)),
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_the_sum_over_examples_whatever_the_batch(name, tmp_path):
    options, labels, loss = HEADS[name]
    models.tiny_bert_classifier(tmp_path, **options)
    model, data = task_of(tmp_path, {"text": TEXTS, "label": labels})
    logits = [model(**data.tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    expected = sum(loss(z, y) for z, y in zip(logits, labels, strict=True))
    for size in (1, 4, 6):
        found = sum(data.loss(model, batch) for batch in data.batches(size))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_batches_of_like_lengths_have_little_padding(tmp_path):
    models.tiny_bert_classifier(tmp_path)
    texts = [" ".join(["film"] * length) for length in (2, 9, 1, 8, 9, 2)]
    _, data = task_of(tmp_path, {"text": texts, "label": [0, 1, 0, 1, 0, 1]})
    data.sort_by_length()
    assert [batch["attention_mask"].sum(1).tolist() for batch in data.batches(3)] == [[11, 11, 10], [4, 4, 3]]
    assert [batch["labels"].tolist() for batch in data.batches(3)] == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("pad", [None, 0, 7])
def test_a_decoder_that_classifies_finds_the_last_token_by_its_own_padding(pad, tmp_path):
    """Not by the tokenizer's, which is 0 here; a config without any reads one text at a time."""
    config = models.tiny_llama().config
    config.pad_token_id, config.num_labels = pad, 2
    with models.seeded(3):
        models.save(transformers.LlamaForSequenceClassification(config), tmp_path, "llama")
    model, data = task_of(tmp_path, {"text": TEXTS, "label": [0, 1] * 3})
    alone = [model(**data.tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    loss = torch.nn.functional.cross_entropy(torch.stack(alone), torch.tensor([0, 1] * 3), reduction="sum")
    torch.testing.assert_close(sum(data.loss(model, batch) for batch in data.batches(6)), loss)


def test_labels_by_name_are_those_by_place(tmp_path):
    names = {0: "red", 1: "green", 2: "blue"}
    models.tiny_bert_classifier(
        tmp_path,
        labels=3,
        problem_type="multi_label_classification",
        id2label=names,
        label2id={v: k for k, v in names.items()},
    )
    _, data = task_of(tmp_path, {"text": TEXTS[:3], "label": [["blue", "red"], [], ["green"]]})
    assert next(data.batches(3))["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    _, data = task_of(tmp_path, {"text": TEXTS[:1], "label": [["pink"]]})
    with pytest.raises(StatisticsError, match="unknown label 'pink'"):
        next(data.batches(1))
    _, data = task_of(tmp_path, {"text": TEXTS[:1], "label": [1]})
    with pytest.raises(StatisticsError, match="1 in column 'label' is no list"):
        next(data.batches(1))


def test_labels_are_matched_by_their_names_where_data_and_model_number_them_differently(tmp_path):
    """As of NLI, where models and data sets count from entailment or from contradiction."""
    names = {0: "CONTRADICTION", 1: "neutral", 2: "Entailment"}
    models.tiny_bert_classifier(tmp_path, labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    config = [transformers.AutoConfig.from_pretrained(tmp_path), [open_source(tmp_path)]]

    def labels(data_names: list[str] | None, values: list[Any]) -> list[int]:
        rows = datasets.Dataset.from_dict({"text": TEXTS[: len(values)], "label": values})
        if data_names:
            rows = rows.cast_column("label", datasets.ClassLabel(names=data_names))
        return next(open_task("BertForSequenceClassification", *config, rows, Columns()).batches(9))["labels"].tolist()

    assert labels(["entailment", "neutral", "contradiction"], [0, 1, 2, 0]) == [2, 1, 0, 2]
    assert labels(["a", "b", "c"], [0, 1, 2]) == labels(None, [0, 1, 2]) == [0, 1, 2]
    assert labels(None, ["entailment", "Neutral"]) == [2, 1]
    with pytest.raises(StatisticsError, match=r"unknown label 'entail'\. Did you mean 'Entailment'"):
        labels(None, ["entail"])
    with pytest.raises(StatisticsError, match="label -1 in column 'label', but the model has 3 labels"):
        labels(None, [-1])


def test_tags_are_matched_by_their_names(tmp_path):
    save_bert(tmp_path, "BertForTokenClassification", id2label={0: "O", 1: "B", 2: "I"}, label2id=TAGS)
    tags = datasets.Sequence(datasets.ClassLabel(names=["B", "I", "O"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    rows = datasets.Dataset.from_dict({"tokens": [["the", "film", "was"]], "ner_tags": [[2, 0, 1]]}, features=features)
    config, files = transformers.AutoConfig.from_pretrained(tmp_path), [open_source(tmp_path)]
    data = open_task("BertForTokenClassification", config, files, rows, Columns())
    assert next(data.batches(1))["labels"].tolist() == [[IGNORED, 0, 1, 2, IGNORED]]


def test_what_is_no_text_is_refused_by_its_column(tmp_path):
    models.tiny_bert_classifier(tmp_path)
    _, data = task_of(tmp_path, {"text": [TEXTS[0], None], "label": [0, 1]})
    with pytest.raises(StatisticsError, match="column 'text' holds 'None' where a text is to be"):
        list(data.batches(2))


def test_memory_that_runs_out_says_what_takes_less(tmp_path):
    models.tiny_llama(tmp_path, vocab_size=1_000_000, max_position_embeddings=9000)
    rows = datasets.Dataset.from_dict({"text": ["the film " * 4000] * 64})  # whose logits take two terabytes
    with pytest.raises(ResourceError, match=r"memory ran out while measuring statistics.*--batch-size"):
        mats_hub.compute_statistics(tmp_path, dataset=rows, kind="gram", batch_size=64, max_length=8000, device="cpu")


def test_accuracy_counts_labels_and_a_regression_has_none(tmp_path):
    options, labels, _ = HEADS["several labels, as zeros and ones"]
    models.tiny_bert_classifier(tmp_path / "several", **options)
    model, data = task_of(tmp_path / "several", {"text": TEXTS, "label": labels})
    logits = torch.stack([model(**data.tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS])
    assert data.accuracy(model) == pytest.approx(float(((logits > 0) == torch.tensor(labels)).float().mean()))
    models.tiny_bert_classifier(tmp_path / "one", labels=1, problem_type="regression")
    model, data = task_of(tmp_path / "one", {"text": TEXTS, "label": [0.5] * 6})
    with pytest.raises(StatisticsError, match="predicts numbers"):
        data.accuracy(model)


DRAWN = {
    "one label of three": (models.tiny_bert_classifier, {"labels": 3}, {}),
    "regression": (models.tiny_bert_classifier, {"labels": 1, "problem_type": "regression"}, {}),
    "several labels": (models.tiny_bert_classifier, {"labels": 3, "problem_type": "multi_label_classification"}, {}),
    "causal": (models.tiny_llama, {}, {}),
    "sequence to sequence": (models.tiny_t5, {}, {"target": models.tiny_texts(6, 2)}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_labels_follow_the_models_predictions(name, tmp_path):
    factory, options, columns = DRAWN[name]
    factory(tmp_path, **options)
    rows = {"text": [TEXTS[0]] * 300, **{key: [value[0]] * 300 for key, value in columns.items()}}
    model, data = task_of(tmp_path, rows, needs_labels=False)
    data.draw_labels(model, seed=0)
    batch = next(data.batches(300))
    with torch.no_grad():
        logits = model(**{key: value[:1] for key, value in batch.items()}).logits[0]
    drawn = batch["labels"]
    if name == "regression":
        assert float(drawn.mean()) == pytest.approx(float(logits[0]), abs=0.2)
        assert float(drawn.std()) == pytest.approx(1, abs=0.15)
        return
    if name == "several labels":
        torch.testing.assert_close(drawn.mean(0), logits.sigmoid(), rtol=0, atol=0.12)
        return
    if data.task.per_token:
        place = 1 if name == "causal" else 0
        assert (drawn[:, 0] == IGNORED).all() == bool(place)
        drawn, logits = drawn[:, place], logits[0]
    counts = torch.bincount(drawn, minlength=logits.shape[-1]) / 300
    torch.testing.assert_close(counts, logits.softmax(-1), rtol=0, atol=0.12)


def test_true_fisher_needs_no_labels_and_is_recorded(tmp_path):
    models.tiny_bert_classifier(tmp_path / "expert", labels=3)
    rows = datasets.Dataset.from_dict({"text": models.tiny_texts(12, 4)})
    options = {"dataset": rows, "kind": ["fisher", "kfac"], "labels": "model"}
    one = mats_hub.compute_statistics(tmp_path / "expert", batch_size=1, **options)
    other = mats_hub.compute_statistics(tmp_path / "expert", batch_size=5, **options)
    assert one.provenance.label_source == "model"
    for key in one.keys():  # noqa: SIM118
        torch.testing.assert_close(one.tensor(key), other.tensor(key), rtol=1e-4, atol=1e-5)
    another = mats_hub.compute_statistics(tmp_path / "expert", seed=1, **options)
    assert not torch.allclose(one.tensor("classifier.weight.fisher"), another.tensor("classifier.weight.fisher"))
    with pytest.raises(StatisticsError, match="which column is the label"):
        mats_hub.compute_statistics(tmp_path / "expert", dataset=rows, kind="fisher")
    with pytest.raises(mats_hub.MatsError, match="source of labels 'modle'"):
        mats_hub.compute_statistics(tmp_path / "expert", dataset=rows, labels="modle")


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    models.tiny_llama(folder)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"chat_template": TEMPLATE}))
    return folder


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_of_a_conversation_only_the_assistants_tokens_count(chat):
    talk = turns("the film was good", "it was dull", "so", "we liked the plot")
    _, data = task_of(chat, {"messages": [talk, talk[:2], talk[:1]]})
    assert data.task.name == "chat"
    batch = next(data.batches(3))
    named = [[{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in talk]]
    assert next(task_of(chat, {"conversations": named})[1].batches(1))["labels"].equal(batch["labels"][:1])
    assert len(batch["input_ids"]) == 2, "a conversation without an answer has nothing to learn from"
    for row, answers in ((0, ["it was dull </s>", "we liked the plot </s>"]), (1, ["it was dull </s>"])):
        labels = batch["labels"][row]
        counted = labels[labels != IGNORED]
        assert data.tokenizer.decode(counted).split() == " ".join(answers).split()
        assert (batch["input_ids"][row][labels != IGNORED] == counted).all()
    statistics = mats_hub.compute_statistics(
        chat, dataset=datasets.Dataset.from_dict({"messages": [talk, talk[:2]]}), kind="gram"
    )
    assert statistics.provenance.task == "chat"
    assert statistics.provenance.columns == {"messages": "messages"}


THOUGHTS = {
    # As in Qwen3: the last answer has a thought, an empty one where none is stored, and earlier ones have none.
    "left out of earlier answers": (
        "{% for m in messages %}{{ '[CLS] ' if m['role'] == 'user' else '<s> ' }}"
        "{% if m['role'] == 'assistant' and loop.last %}so then {% endif %}{{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<s> {% endif %}",
        ["so then we liked the plot </s>"],
    ),
    # As in DeepSeek-R1: what asks for an answer opens a thought, which stored answers do not have.
    "opened by the prompt": (TEMPLATE.replace("<s> {% endif", "<s> so {% endif"), [
        "it was dull </s>", "we liked the plot </s>"
    ]),
}  # fmt: skip


@pytest.mark.parametrize("thoughts", THOUGHTS)
def test_an_answer_counts_as_the_template_has_it_in_the_end(chat, thoughts):
    _, data = task_of(chat, {"messages": [turns("the film was good", "it was dull", "so", "we liked the plot")]})
    data.tokenizer.chat_template, answers = THOUGHTS[thoughts]
    batch = next(data.batches(1))
    counted = batch["labels"] != IGNORED
    assert data.tokenizer.decode(batch["labels"][counted]).split() == " ".join(answers).split()
    assert batch["input_ids"][counted].equal(batch["labels"][counted])
    whole = data.tokenizer.apply_chat_template(data.dataset[0]["messages"], return_dict=False)
    assert batch["input_ids"][0].tolist() == whole


def test_a_conversation_that_does_not_fit_its_template_is_refused(chat, tmp_path):
    models.tiny_llama(tmp_path)
    _, data = task_of(tmp_path, {"messages": [turns("so", "we liked it")]})
    with pytest.raises(StatisticsError, match="no chat template"):
        next(data.batches(1))
    _, data = task_of(chat, {"messages": [turns("so", "we liked it", "then", "it was good")]})
    data.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(StatisticsError, match="changes what was asked"):
        next(data.batches(1))
    data.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(StatisticsError, match="conversation of user: roles must alternate; leave"):
        next(data.batches(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    models.tiny_llama(folder)
    return folder


def counted(data: TaskData) -> list[str]:
    batch = next(data.batches(8))
    places = batch["labels"] != IGNORED
    assert batch["input_ids"][places].equal(batch["labels"][places])
    return [" ".join(data.tokenizer.decode(row[row != IGNORED]).split()) for row in batch["labels"]]


def test_of_a_prompt_and_its_completion_only_the_completion_counts(plain, chat):
    rows = {"prompt": ["the film was ", "so "], "completion": ["very good", "we liked it </s>"], "source": ["a", "b"]}
    for folder in (plain, chat):
        model, data = task_of(folder, rows)
        assert data.task.name == "completion"
        assert counted(data) == ["very good </s>", "we liked it </s>"]
        assert data.tokenizer.decode(next(data.batches(1))["input_ids"][0]) == "<s> the film was very good </s>"
    singly = sum(data.loss(model, batch) for batch in data.batches(1))
    torch.testing.assert_close(sum(data.loss(model, batch) for batch in data.batches(2)), singly, rtol=1e-5, atol=1e-6)
    found = mats_hub.compute_statistics(plain, dataset=datasets.Dataset.from_dict(rows), kind="gram", device="cpu")
    assert found.provenance.task == "completion"
    assert found.provenance.columns == {"text": ("prompt",), "target": "completion"}
    talks = {
        "prompt": [turns("the film was good", "it was dull", "so")],
        "completion": [[{"role": "assistant", "content": "we liked the plot"}]],
    }
    assert counted(task_of(chat, talks)[1]) == ["we liked the plot </s>"]


def test_a_question_and_its_answer_are_a_conversation(plain, chat):
    rows = {"question": ["was it good"], "answer": ["very dull"]}
    told = [task_of(folder, rows)[1] for folder in (plain, chat)]
    assert [counted(data) for data in told] == [["very dull </s>"]] * 2
    without, with_template = (data.tokenizer.decode(next(data.batches(1))["input_ids"][0]).split() for data in told)
    assert without == ["<s>", "was", "it", "good", "very", "dull", "</s>"]
    assert with_template == ["[CLS]", "was", "it", "good", "</s>", "<s>", "very", "dull", "</s>"]
    rows = {"instruction": ["was it good", "so"], "input": ["the film", ""], "output": ["it was", "it was dull"]}
    assert counted(task_of(plain, rows)[1]) == ["it was </s>", "it was dull </s>"]
    assert task_of(plain, rows | {"text": ["the film", "it was"]})[1].task.name == "causal-lm", "the text as trained on"
    with pytest.raises(StatisticsError, match=r"'question' and 'answer' have to hold texts.*--task causal-lm"):
        next(task_of(plain, {"question": ["so"], "answer": [1]})[1].batches(1))


# --- words, answers, masked tokens


def save_bert(folder: Path, class_name: str, **options: Any) -> Any:
    body = models.tiny_bert_body(seed=2)
    for name, value in options.items():
        setattr(body.config, name, value)
    with models.seeded(3):
        model = getattr(transformers, class_name)(body.config).eval()
    tokenizer = models.tiny_tokenizer("bert")
    tokenizer.mask_token = "[UNK]"
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return model


TAGS = {"O": 0, "B": 1, "I": 2}
SENTENCES = [["the", "film", "was"], ["very good", "plot"], ["it"], ["they", "liked", "the slow", "song"]]
CONTEXT = "the film was very good and the plot was dull"
TOKEN_TASKS: dict[str, tuple[str, dict[str, list[Any]], list[Any]]] = {
    # class of the model: its task, rows, the labels of each row's tokens; of answers the first and last token
    "BertForTokenClassification": (
        "token-classification",
        {"tokens": SENTENCES, "ner_tags": [[0, 1, 2], [1, 0], [IGNORED], [0, 1, 2, 0]]},
        [
            [IGNORED, 0, 1, 2, IGNORED],
            [IGNORED, 1, IGNORED, 0, IGNORED],
            [IGNORED] * 3,
            [IGNORED, 0, 1, 2, IGNORED, 0, IGNORED],
        ],
    ),
    "BertForQuestionAnswering": (
        "question-answering",
        {
            "question": ["it was good", "so", "was it dull", "it"],
            "context": [CONTEXT, CONTEXT, CONTEXT, CONTEXT * 9],
            "answers": [
                {"text": ["very good", "film"], "answer_start": [13, 4]},
                {"text": ["he"], "answer_start": [1]},
                {"text": [], "answer_start": []},
                {"text": ["dull"], "answer_start": [len(CONTEXT * 9) - 4]},
            ],
        },
        [[8, 9], [3, 3], [0, 0], [0, 0]],
    ),
    "BertForMaskedLM": ("fill-mask", {"text": TEXTS[:4]}, []),
}


def test_a_word_in_a_list_has_the_tokens_it_has_in_a_text(tmp_path):
    """Byte-level tokenizers, as RoBERTa's, write the space before a word into its first token."""
    words = ["Anna", "lives", "in", "Rome"]
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator([" ".join(words)] * 20, 300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    learned.save_model(str(tmp_path))
    tokenizer = transformers.RobertaTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer.save_pretrained(tmp_path)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=len(TAGS),
    )  # fmt: skip
    transformers.RobertaForTokenClassification(config).save_pretrained(tmp_path)
    _, data = task_of(tmp_path, {"tokens": [words], "ner_tags": [[1, 0, 0, 2]]})
    (example,) = data.batches(1)
    assert example["input_ids"][0].tolist() == tokenizer(" " + " ".join(words))["input_ids"]
    assert example["input_ids"][0].tolist() != tokenizer(words, is_split_into_words=True)["input_ids"]


@pytest.mark.parametrize("class_name", TOKEN_TASKS)
def test_what_is_told_token_by_token(class_name, tmp_path):
    task, rows, expected = TOKEN_TASKS[class_name]
    named = {"id2label": {i: tag for tag, i in TAGS.items()}, "label2id": TAGS} if "ner_tags" in rows else {}
    model = save_bert(tmp_path, class_name, **named)
    _, data = task_of(tmp_path, rows)
    assert data.task.name == task
    examples = list(data.batches(1))
    if expected:
        assert [example["labels"][0].tolist() for example in examples] == expected
    for example in examples if task == "fill-mask" else ():
        masked = example["labels"] != IGNORED
        assert masked.sum() == max(1, round(0.15 * (masked.numel() - 2)))
        assert (example["input_ids"][masked] == data.tokenizer.mask_token_id).all()
        assert not masked[0, [0, -1]].any()
    loss = 0.0
    for example in examples:
        labels = example.pop("labels")
        if task == "question-answering":
            loss += model(**example, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
        elif (labels != IGNORED).any():
            loss += model(**example, labels=labels).loss
    for size in (1, 3, 4):
        found = sum(data.loss(model, batch) for batch in data.batches(size))
        torch.testing.assert_close(found, torch.as_tensor(loss), rtol=1e-5, atol=1e-5)
    batches = [
        mats_hub.compute_statistics(
            tmp_path, dataset=data.dataset, kind=["kfac", "fisher"], batch_size=size, device="cpu"
        )
        for size in (1, 4)
    ]
    for key in batches[0].keys():  # noqa: SIM118
        one, other = (found.tensor(key) for found in batches)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9 + 1e-6 * float(one.abs().max()))
    drawn = mats_hub.compute_statistics(tmp_path, dataset=data.dataset, kind="fisher", labels="model", device="cpu")
    assert drawn.provenance.label_source == "model"
    right = total = 0
    for example in data.batches(1):
        labels = example["labels"]
        told = data.logits(model, example).argmax(-1)[labels != IGNORED]
        right, total = right + int((told == labels[labels != IGNORED]).sum()), total + int((labels != IGNORED).sum())
    assert mats_hub.evaluate(tmp_path, dataset=data.dataset) == pytest.approx(right / total)
    if task == "token-classification":
        assert 0 <= mats_hub.evaluate(tmp_path, dataset=data.dataset, metric="f1") <= 1
    else:
        with pytest.raises(StatisticsError, match="f1 is of single labels"):
            mats_hub.evaluate(tmp_path, dataset=data.dataset, metric="f1")


def test_a_body_without_a_head_has_grams_alone(tmp_path):
    models.save(models.tiny_bert_body(seed=1), tmp_path / "body", "bert")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    options = {"dataset": rows, "device": "cpu"}
    found = mats_hub.compute_statistics(tmp_path / "body", kind="gram", batch_size=4, **options)
    assert found.provenance.task == "feature-extraction"
    model, data = task_of(tmp_path / "body", {"text": TEXTS})
    with torch.no_grad():
        inputs = [model.embeddings(data.tokenizer(text, return_tensors="pt")["input_ids"])[0] for text in TEXTS]
    expected = sum(x.T @ x for x in inputs)
    gram = found.tensor("encoder.layer.0.attention.self.query.input_gram")
    torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(StatisticsError, match=r"BertModel has no loss here.*--kind gram"):
        mats_hub.compute_statistics(tmp_path / "body", kind="kfac", **options)
    with pytest.raises(StatisticsError, match="BertModel predicts nothing"):
        mats_hub.evaluate(tmp_path / "body", dataset=rows)


def test_words_and_answers_that_do_not_fit_are_refused(tmp_path):
    save_bert(tmp_path / "words", "BertForTokenClassification", id2label={0: "O", 1: "B"}, label2id={"O": 0, "B": 1})
    save_bert(tmp_path / "answers", "BertForQuestionAnswering")
    words, question = {"tokens": [["it", "was"]]}, {"question": ["it"], "context": [CONTEXT]}
    answers = [{"text": ["dull"], "answer_start": [0]}]
    for folder, rows, told in (
        ("words", words | {"ner_tags": [[0]]}, "a list of words, and column 'ner_tags' a tag for each"),
        ("words", {"words": ["it was"], "tags": [[0, 1]]}, "column 'words' has to hold a list of words"),
        ("words", words | {"ner_tags": [[0, 7]]}, "label 7 in column 'ner_tags', but the model has 2 labels"),
        ("words", words, "which column is the tags; name it with --label"),
        ("answers", {"text": ["it"], "answers": answers}, "name both columns"),
        ("answers", question | {"answers": ["dull"]}, "has to hold answers"),
        ("answers", {"question": ["it " * 40], "context": [CONTEXT], "answers": answers}, "does not take an example"),
    ):
        with pytest.raises(StatisticsError, match=told):
            next(task_of(tmp_path / folder, rows)[1].batches(1))
    _, data = task_of(tmp_path / "words", words | {"tags": [["B", "O"]]})
    assert next(data.batches(1))["labels"].tolist() == [[IGNORED, 1, 0, IGNORED]]
    assert (
        mats_hub.compute_statistics(
            tmp_path / "words", dataset=datasets.Dataset.from_dict(words), kind="gram", device="cpu"
        ).provenance.tokens
        == 4
    )


# --- images among classes, speech, text that a model generates itself


def save_clip(folder: Path) -> Any:
    width = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    config = transformers.CLIPConfig(
        text_config=width | {"vocab_size": 36, "max_position_embeddings": 32, "eos_token_id": 5, "bos_token_id": 4},
        vision_config=width | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    with models.seeded(3):
        model = transformers.CLIPModel(config).eval()
    side = {"height": 8, "width": 8}
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=side)
    for part in (model, transformers.CLIPProcessor(pixels, models.tiny_tokenizer("t5"))):
        part.save_pretrained(folder)  # the two in one file
    return model


CLASSES = ["bright_film", "slow song", "the very cold plot"]


@pytest.fixture
def clip(tmp_path):
    model = save_clip(tmp_path / "clip")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"image": models.tiny_images(5), "label": [0, 2, 1, 1, 0]}
    return tmp_path / "clip", model, datasets.Dataset.from_dict(rows, features=features)


def test_an_image_is_told_from_the_classes_names(clip):
    folder, model, rows = clip
    found = mats_hub.compute_statistics(folder, dataset=rows, kind=["kfac", "fisher"], batch_size=3, device="cpu")
    assert found.provenance.task == "zero-shot-image-classification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    phrases = ["a photo of a bright film", "a photo of a slow song", "a photo of a the very cold plot"]
    texts = tokenizer(phrases, padding=True, return_tensors="pt")
    layers = ("visual_projection.weight", "text_projection.weight", "text_model.encoder.layers.1.mlp.fc1.weight")
    total, right = dict.fromkeys(layers, 0), 0
    for row in rows:
        pixels = processor(row["image"], return_tensors="pt")["pixel_values"]
        logits = model(pixel_values=pixels, **texts).logits_per_image
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([row["label"]]))
        parameters = [model.get_parameter(name) for name in layers]
        for name, gradient in zip(layers, torch.autograd.grad(loss, parameters), strict=True):
            total[name] = total[name] + gradient.square()
        right += int(logits.argmax() == row["label"])
    for name, value in total.items():
        torch.testing.assert_close(found.tensor(f"{name}.fisher"), value, rtol=1e-3, atol=1e-6 * float(value.max()))
    assert found.tokens["text_model.encoder.layers.1.mlp.fc1"] == 5 * int(texts["attention_mask"].sum())
    assert found.tokens["vision_model.encoder.layers.1.mlp.fc1"] == 5 * (4 + 1)
    singly = mats_hub.compute_statistics(folder, dataset=rows, batch_size=1, device="cpu")
    for key in singly.keys():  # noqa: SIM118
        value = singly.tensor(key)
        torch.testing.assert_close(found.tensor(key), value, rtol=1e-3, atol=1e-6 * float(value.abs().max()))
    assert mats_hub.evaluate(folder, dataset=rows) == right / 5


def test_an_image_of_no_known_class_is_refused(clip):
    folder, _, rows = clip
    strings = datasets.Dataset.from_dict({"image": models.tiny_images(2), "label": ["film", "song"]})
    assert mats_hub.compute_statistics(folder, dataset=strings, device="cpu").provenance.examples == 2
    with pytest.raises(StatisticsError, match="names; name the label column"):
        mats_hub.compute_statistics(folder, dataset=rows.remove_columns("label"), kind="gram", device="cpu")


@pytest.fixture
def whisper(tmp_path):
    folder = tmp_path / "whisper"
    with models.seeded(3):
        model = tiny_whisper().eval()
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=8, sampling_rate=16000, hop_length=1000, chunk_length=1
    )
    for part in (model, models.tiny_tokenizer("t5"), extractor):
        part.save_pretrained(folder)
    return folder, model, extractor


def test_speech_is_measured_on_its_transcript(whisper):
    folder, model, extractor = whisper
    generator = torch.Generator().manual_seed(4)
    sounds = [torch.randn(9000 + 1000 * i, generator=generator).tolist() for i in range(4)]
    rows = datasets.Dataset.from_dict({"audio": sounds, "sentence": TEXTS[:4]})
    found = mats_hub.compute_statistics(folder, dataset=rows, kind=["kfac", "fisher"], batch_size=3, device="cpu")
    assert found.provenance.task == "speech-recognition"
    assert found.provenance.columns == {"target": "sentence", "audio": "audio"}
    name = "model.decoder.layers.0.fc1.weight"
    tokenizer, total, tokens = models.tiny_tokenizer("t5"), 0, 0
    for sound, text in zip(sounds, TEXTS, strict=False):
        features = extractor(sound, sampling_rate=16000, return_tensors="pt")["input_features"]
        labels = tokenizer(text, return_tensors="pt")["input_ids"]
        loss = model(input_features=features, labels=labels).loss
        total = total + torch.autograd.grad(loss, model.get_parameter(name))[0].square()
        tokens += labels.numel()
    torch.testing.assert_close(found.tensor(f"{name}.fisher"), total, rtol=1e-3, atol=1e-6 * float(total.max()))
    assert found.tokens["model.decoder.layers.0.fc1"] == tokens
    other = datasets.Dataset.from_dict({"audio": [{"array": sounds[0], "sampling_rate": 44100}], "sentence": TEXTS[:1]})
    with pytest.raises(StatisticsError, match=r"44100 samples a second.*sampling_rate=16000"):
        mats_hub.compute_statistics(folder, dataset=other, device="cpu")


SEEN_AND_SAID = (
    "{% for m in messages %}{{ '[CLS] ' if m['role'] == 'user' else '[SEP] ' }}"
    "{% for part in m['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}"
    "{{ '</s> ' if m['role'] == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}{{ '[SEP] ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Save a language model that sees images; return its folder, itself and its processor."""
    folder = tmp_path_factory.mktemp("llava")
    sides = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = models.tiny_tokenizer("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**sides, vocab_size=40, max_position_embeddings=64),
        vision_config=transformers.CLIPVisionConfig(**sides, image_size=8, patch_size=4, projection_dim=8),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with models.seeded(3):
        model = transformers.LlavaForConditionalGeneration(config).eval()
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = transformers.LlavaProcessor(
        pixels, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>", chat_template=SEEN_AND_SAID,
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def said_of(images: int, answer: str, question: str = "was it") -> list[dict[str, Any]]:
    asked = [{"type": "image", "text": None}] * images + [{"type": "text", "text": question}]
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def test_answers_about_images_are_what_counts_in_a_conversation_and_in_columns(llava):
    folder, model, processor = llava
    pictures = models.tiny_images(4)
    images, answers = [pictures[:1], pictures[1:3], pictures[3:]], ["bad film", "good", "a warm slow song"]
    layers = (
        "model.language_model.layers.1.mlp.up_proj.weight",
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.multi_modal_projector.linear_1.weight",
    )
    total: dict[str, Any] = dict.fromkeys(layers, 0)
    loss = lengths = 0
    for seen, answer in zip(images, answers, strict=True):
        text = f"[CLS] {'<image> ' * len(seen)}was it [SEP] {answer} </s>"
        inputs = processor(text=text, images=seen, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, : -len(answer.split()) - 1] = IGNORED  # what is said, and that it ends
        found = model(**inputs, labels=labels).loss
        parameters = [model.get_parameter(name) for name in layers]
        for name, gradient in zip(layers, torch.autograd.grad(found, parameters), strict=True):
            total[name] = total[name] + gradient.square()
        loss += found.item() / 3
        lengths += labels.numel()
    told = [said_of(len(seen), answer) for seen, answer in zip(images, answers, strict=True)]
    talked = datasets.Dataset.from_dict({"images": images, "messages": told})
    found = mats_hub.compute_statistics(folder, dataset=talked, kind=["kfac", "fisher"], batch_size=2, device="cpu")
    assert found.provenance.task == "image-text-to-text"
    for name, value in total.items():
        torch.testing.assert_close(found.tensor(f"{name}.fisher"), value, rtol=1e-3, atol=1e-6 * float(value.max()))
    # The text's tokens, an image's patches and its class token, and the patches alone.
    assert [found.tokens[name.removesuffix(".weight")] for name in layers] == [lengths, 4 * (4 + 1), 4 * 4]
    assert mats_hub.evaluate(folder, dataset=talked, metric="loss") == pytest.approx(loss, rel=1e-5)
    # Where the images are not placed they come first; a question and its answer are a conversation.
    rows = {"images": images, "question": ["was it"] * 3, "answer": answers}
    asked = datasets.Dataset.from_dict(rows)
    assert mats_hub.evaluate(folder, dataset=asked, metric="loss") == pytest.approx(loss, rel=1e-5)
    told = [[{"from": speaker, "value": t} for speaker, t in (("human", "was it"), ("gpt", a))] for a in answers]
    talked = datasets.Dataset.from_dict({"image": images, "conversations": told})
    assert mats_hub.evaluate(folder, dataset=talked, metric="loss") == pytest.approx(loss, rel=1e-5)
    wrong = datasets.Dataset.from_dict({"images": [pictures], "messages": [said_of(3, "good")]})
    with pytest.raises(StatisticsError, match="names 3 of the 4 images"):
        mats_hub.compute_statistics(folder, dataset=wrong, device="cpu")
    wrong = datasets.Dataset.from_dict({"images": [pictures[:1]], "messages": [said_of(2, "good")]})
    with pytest.raises(StatisticsError, match="more images than the 1 it has"):
        mats_hub.compute_statistics(folder, dataset=wrong, device="cpu")
    for message, said in (
        ({"role": "user", "text": "a"}, "messages with role"),
        ({"role": "user", "content": 3}, "parts"),
    ):
        wrong = datasets.Dataset.from_dict({"image": pictures[:1], "messages": [[message]]})
        with pytest.raises(StatisticsError, match=said):
            mats_hub.compute_statistics(folder, dataset=wrong, device="cpu")


def test_a_model_that_sees_is_measured_on_texts_as_any_language_model(llava):
    folder, model, processor = llava
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    found = mats_hub.compute_statistics(folder, dataset=rows, batch_size=3, device="cpu")
    assert found.provenance.task == "causal-lm"
    losses = []
    for text in TEXTS:
        inputs = processor.tokenizer(text, return_tensors="pt")
        losses.append(model(**inputs, labels=inputs["input_ids"]).loss.item())
    assert mats_hub.evaluate(folder, dataset=rows, metric="loss") == pytest.approx(sum(losses) / 6, rel=1e-5)
    drawn = mats_hub.compute_statistics(folder, kind="gram", examples=4, max_length=6, device="cpu")
    assert drawn.provenance.task == "generated"


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
WAVES = {
    **{"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 4},
    **{"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 12, "vocab_size": 36, "pad_token_id": 0},
}
PATCHES = {"num_mel_bins": 16, "max_length": 20, "patch_size": 4, "frequency_stride": 4, "time_stride": 4}
HEARING: dict[str, tuple[type, type, dict[str, Any], Any, str]] = {
    # name: model, config and its settings, what makes features of sounds, the task
    "waves, a class": (
        transformers.Wav2Vec2ForSequenceClassification,
        transformers.Wav2Vec2Config,
        WAVES,
        transformers.Wav2Vec2FeatureExtractor(),
        "audio-classification",
    ),
    "patches of a spectrogram, a class": (
        transformers.ASTForAudioClassification,
        transformers.ASTConfig,
        PATCHES,
        transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=20),
        "audio-classification",
    ),
    "waves, a transcript": (
        transformers.HubertForCTC,
        transformers.HubertConfig,
        WAVES | {"ctc_loss_reduction": "mean"},
        transformers.Wav2Vec2FeatureExtractor(),
        "ctc",
    ),
}


def hearing(folder: Path, name: str) -> tuple[Any, dict[str, list[Any]]]:
    """Save a model of sounds; return it and examples that differ in length."""
    model_class, config_class, settings, extractor, task = HEARING[name]
    with models.seeded(5):
        model = model_class(config_class(**SMALL, **settings, num_labels=3)).eval()
    for part in (model, extractor, models.tiny_tokenizer("t5")):
        part.save_pretrained(folder)
    generator = torch.Generator().manual_seed(4)
    sounds = [torch.randn(1200 + 100 * i, generator=generator).tolist() for i in range(4)]
    return model, {"audio": sounds} | ({"label": [0, 2, 1, 2]} if task != "ctc" else {"transcription": TEXTS[:4]})


@pytest.mark.parametrize("name", HEARING)
def test_sounds_of_any_lengths_are_measured_as_they_are_heard_alone(tmp_path, name):
    model, rows = hearing(tmp_path, name)
    extractor, task = HEARING[name][3:]
    data = datasets.Dataset.from_dict(rows)
    found = mats_hub.compute_statistics(tmp_path, dataset=data, kind=["kfac", "fisher"], batch_size=3, device="cpu")
    assert found.provenance.task == task
    names = [key.removesuffix(".fisher") for key in found.keys() if key.endswith("dense.weight.fisher")]  # noqa: SIM118
    layer = names[0]
    linear, seen = model.get_submodule(layer.removesuffix(".weight")), []
    linear.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach().flatten(0, -2)))
    tokenizer, total, losses = models.tiny_tokenizer("t5"), 0, []
    for sound, told in zip(*rows.values(), strict=True):
        features = extractor(sound, sampling_rate=16000, return_tensors="pt")["input_values"]
        labels = tokenizer(told, return_tensors="pt")["input_ids"] if task == "ctc" else torch.tensor([told])
        loss = model(features, labels=labels).loss
        losses.append(loss.item())
        total = total + torch.autograd.grad(loss, linear.weight)[0].square()
    torch.testing.assert_close(found.tensor(f"{layer}.fisher"), total, rtol=1e-3, atol=1e-6 * float(total.max()))
    heard = torch.cat(seen)
    gram = found.tensor(f"{layer.removesuffix('.weight')}.input_gram")
    torch.testing.assert_close(gram, heard.T @ heard, rtol=1e-3, atol=1e-6 * float(gram.max()))
    assert found.tokens[layer.removesuffix(".weight")] == len(heard)
    renamed = data.rename_column("audio", "clip")
    loss = mats_hub.evaluate(tmp_path, dataset=renamed, audio="clip", metric="loss")
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-5)
    if task == "ctc":
        with pytest.raises(StatisticsError, match="no accuracy; use the loss"):
            mats_hub.evaluate(tmp_path, dataset=data)


def test_what_frames_tell_is_drawn_as_what_is_left_of_a_path(tmp_path):
    _, rows = hearing(tmp_path, "waves, a transcript")
    model, data = task_of(tmp_path, rows)
    head, blank, token = model.lm_head, 0, 7
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    for certain, left in ((token, [token]), (blank, [IGNORED])):
        head.bias.data.zero_()[certain] = 50.0
        data.draw_labels(model, seed=0)
        assert data.drawn == dict.fromkeys(range(4), left)
        assert torch.isfinite(data.loss(model, next(data.batches(4))))
    head.bias.data.zero_()[[blank, token]] = 50.0  # the two alike at every frame
    data.draw_labels(model, seed=0)
    assert {held for labels in data.drawn.values() for held in labels} == {token}
    lengths = [len(labels) for labels in data.drawn.values()]
    frames = [model(features).logits.shape[1] for features in (b["input_values"] for b in data.batches(1))]
    # A run of tokens begins at a frame with probability 1/4.
    assert abs(sum(lengths) - sum(frames) / 4) < 4 * (sum(frames) / 4) ** 0.5


def test_a_language_model_is_measured_on_text_that_it_generates(tmp_path):
    model = models.tiny_gpt2(tmp_path / "gpt2", seed=1)
    options = {"examples": 20, "max_length": 9, "kind": "gram", "device": "cpu"}
    found, again = (mats_hub.compute_statistics(tmp_path / "gpt2", **options) for _ in range(2))
    assert found.provenance.dataset == "text that the model generated itself"
    assert found.provenance.task == "generated"
    assert found.provenance.examples == 20
    assert 20 * 2 <= found.provenance.tokens <= 20 * 9
    other = mats_hub.compute_statistics(tmp_path / "gpt2", **options, seed=1)
    counts = found.tensor("transformer.wte.input_counts")
    assert torch.equal(counts, again.tensor("transformer.wte.input_counts"))
    assert not torch.equal(counts, other.tensor("transformer.wte.input_counts"))
    # One at a time from the model's own predictions, many texts have the tokens' frequencies that it expects.
    many = mats_hub.compute_statistics(tmp_path / "gpt2", **options | {"examples": 600, "max_length": 2})
    seen = many.tensor("transformer.wte.input_counts")
    first = int(seen.argmax())
    assert seen.sum() == 1200
    assert seen[first] >= 600
    with torch.no_grad():
        expected = model(torch.tensor([[first]])).logits[0, -1].softmax(-1) * 600
    seen[first] -= 600
    assert float(((seen - expected).square() / expected).sum()) < 36 + 5 * (2 * 36) ** 0.5
    models.tiny_bert_classifier(tmp_path / "bert")
    with pytest.raises(StatisticsError, match=r"BertForSequenceClassification generates no text.*--dataset"):
        mats_hub.compute_statistics(tmp_path / "bert", device="cpu")
