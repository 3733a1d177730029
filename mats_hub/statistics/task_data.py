"""A task's examples as model inputs, the model's own loss on them, and its score."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mats_hub.errors import StatisticsError
from mats_hub.statistics.collect import IGNORED
from mats_hub.statistics.dataset import Columns
from mats_hub.statistics.multiple_choice import choices_of, right_choice

PHRASE = "a photo of a {}"
"""How a class's name is put in words for a model of images and texts (Radford et al. 2021, section 3.1.4)."""


@dataclass(frozen=True)
class Task:
    """One kind of task.

    Attributes:
        name: what it is called.
        suffixes: endings of the transformers classes that do it.
        roles: the columns it needs.
        encode: (task data, example) → features of one example.
        per_token: whether the loss of an example is a mean over its tokens, so that a batch's is computed from logits.
        in_place: whether a token's label stands at the token, and not before it as where the next one is predicted.
        of_span: whether the labels are the first and the last token of an answer.
        of_path: whether each frame tells a token or none, and the labels are what is left of them (CTC, Graves et al. 2006).
        tokenizes: whether there are texts in it, so that it needs a tokenizer.
        batched: whether an example's tensors are a batch of one already, as what a processor makes of several images, or a
            tokenizer of several choices.
        classifies: whether it gives an example, or a token, one of the model's labels, of which there is an F1.
        mapping: transformers' table of the classes that do it, where their names do not tell.
        processor: the class that reads images or sounds, and the files it may come from.

    """

    name: str
    suffixes: tuple[str, ...]
    roles: tuple[str, ...]
    encode: Callable[[TaskData, dict[str, Any]], dict[str, Any]]
    per_token: bool = False
    in_place: bool = False
    of_span: bool = False
    of_path: bool = False
    tokenizes: bool = True
    batched: bool = False
    classifies: bool = False
    mapping: str = ""
    processor: tuple[str, ...] | None = None


@dataclass
class TaskData:
    """A task's examples, ready for a model.

    Attributes:
        task: the kind of task.
        dataset: the examples (`datasets.Dataset`).
        columns: the columns they are read from.
        config: the model's config.
        tokenizer: for text.
        processor: for images and sounds.
        max_length: tokens after which a text is cut.
        singly: whether a batch holds one example, as of sounds that differ in length.
        drawn: row → labels drawn from the model's predictions, in place of the data's.
        last_batch: number of the batch that was handed out last.
        classes: inputs that go with every example: the names of the classes that an image is told from.

    """

    task: Task
    dataset: Any
    columns: Columns
    config: Any
    tokenizer: Any = None
    processor: Any = None
    max_length: int | None = None
    singly: bool = False
    drawn: dict[int, Any] = field(default_factory=dict)
    last_batch: int = -1
    classes: dict[str, Tensor] = field(default_factory=dict)

    def sort_by_length(self) -> None:
        """Put the longest examples first: batches of like lengths have little padding, and too little memory shows at once."""
        columns = self.columns
        read = [*columns.text, *filter(None, (columns.target, columns.messages))] or ["input_ids"]
        if self.singly or not self.task.tokenizes or not {*read} <= {*self.dataset.column_names}:
            return
        lengths = [
            sum(len(str(value)) for value in row) for row in zip(*(self.dataset[name] for name in read), strict=True)
        ]
        self.dataset = self.dataset.select(sorted(range(len(lengths)), key=lambda index: -lengths[index]))

    def batches(
        self, size: int, device: torch.device | str = "cpu", first: int = 0, step: int = 1
    ) -> Iterator[dict[str, Any]]:
        """Yield model inputs of `size` examples, padded to the longest of each batch, on `device`.

        With `first` and `step` only every `step`-th batch, from number `first` on. Where `singly`, of one example each.
        Texts without a single token (the empty lines of a language-model corpus) are left out.
        """
        size = 1 if self.singly else size
        for start in range(first * size, len(self.dataset), step * size):
            self.last_batch = start // size
            indices = range(start, min(start + size, len(self.dataset)))
            features = [f for f in map(self._features, indices) if f.get("input_ids") != []]
            if features:
                yield {key: value.to(device) for key, value in self._padded(features).items()}

    @property
    def pad_token(self) -> int | None:
        """The id by which the model itself knows padding: decoders that classify look for the last token before it."""
        found = getattr(getattr(self.config, "text_config", self.config), "pad_token_id", None)
        return found if found is not None and found >= 0 else None

    @cached_property
    def label_ids(self) -> dict[int, int]:
        """The model's label of each of the data set's, where both have the same names in another order, as of NLI."""
        feature = self.dataset.features.get(self.columns.label)
        names = getattr(getattr(feature, "feature", feature), "names", None) or ()
        own = {plain_name(name): index for name, index in (self.config.label2id or {}).items()}
        theirs = [plain_name(name) for name in names]
        return {index: own[name] for index, name in enumerate(theirs)} if sorted(own) == sorted(theirs) else {}

    @property
    def class_names(self) -> list[str]:
        """The names of the classes that an image is told from: the label column's, or the different labels in it."""
        column = self.columns.label
        if column is None:
            return []
        feature = self.dataset.features[column]
        return list(getattr(feature, "names", None) or sorted({str(value) for value in self.dataset[column]}))

    def name_classes(self) -> None:
        """Put every class's name in words, in `PHRASE`, as inputs that go with every example."""
        if not self.class_names:
            raise StatisticsError(
                "an image is told from the classes by their names; name the label column with --label"
            )
        phrases = [PHRASE.format(name.replace("_", " ")) for name in self.class_names]
        self.classes = dict(
            self.tokenizer(phrases, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        )

    def _features(self, index: int, choice: int | None = None) -> dict[str, Any]:
        """Return an example's features; with `choice` as if that were the right one."""
        try:
            row = self.dataset[index]
        except (ImportError, OSError, RuntimeError) as error:  # of what decodes images and sounds
            raise StatisticsError(f"example {index} of the data set cannot be decoded: {error}") from error
        if choice is not None:
            row[self.columns.label] = choice
        try:
            features = self.task.encode(self, row)
        except (TypeError, ValueError, AttributeError, LookupError) as error:  # of tokenizers and processors, too
            raise StatisticsError(
                f"example {index} of the data set is none of {self.task.name} ({error}); leave it out, or name other columns"
            ) from error
        return {**features, "labels": self.drawn[index]} if index in self.drawn else features

    @torch.no_grad()
    def draw_labels(self, model: nn.Module, seed: int, device: torch.device | str = "cpu") -> None:
        """Take, from now on, labels drawn from the model's own predictions (of the true Fisher) for every example.

        Tokens are drawn for each place given the data's tokens before it. A draw depends on the seed and the example's
        place alone. A regression's label is drawn from a normal distribution of variance one about the prediction.
        """
        model.eval()
        for index in range(len(self.dataset)):
            features = self._features(index)
            if features.get("input_ids") == []:
                continue
            batch = {key: value.to(device) for key, value in self._padded([features]).items()}
            logits = self.logits(model, batch)[0].float().cpu()
            digest = hashlib.sha256(f"{seed}\0{index}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            self.drawn[index] = self._draw(logits, features.get("labels"), generator)

    def _draw(self, logits: Tensor, labels: Any, generator: torch.Generator) -> Any:
        if self.task.of_span:
            return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()
        if self.task.of_path:
            path = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].unique_consecutive()
            return path[path != self.config.pad_token_id].tolist() or [IGNORED]
        if self.task.per_token:
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()
            moved = [IGNORED, *tokens] if self._is_shifted else tokens
            return [IGNORED if old == IGNORED else new for old, new in zip(labels, moved, strict=False)]
        if self.is_regression:
            drawn = logits + torch.randn(logits.shape, generator=generator)
            return float(drawn) if len(drawn) == 1 else drawn.tolist()
        if not self.classes and self.config.problem_type == "multi_label_classification":
            return torch.bernoulli(logits.sigmoid(), generator=generator).tolist()
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

    def _padded(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        fill = getattr(self.tokenizer, "pad_token_id", None) if self.pad_token is None else self.pad_token
        padding = {"labels": IGNORED, "input_ids": fill or 0}
        lengths = {k: max(len(f[k]) for f in features) for k, v in features[0].items() if isinstance(v, list)}
        if (
            self.task.per_token
            and self.config.is_encoder_decoder
            and lengths.get("labels")
            and lengths["labels"] == lengths.get("input_ids")
        ):
            lengths["labels"] += 1  # the two sides must differ in length, for their masks are told apart by shape
        for key in features[0]:
            values = [feature[key] for feature in features]
            if isinstance(values[0], Tensor):
                batch[key] = values[0] if self.task.batched else torch.stack(values)
            elif isinstance(values[0], list):
                fill = padding.get(key, 0)
                batch[key] = torch.tensor([v + [fill] * (lengths[key] - len(v)) for v in values])
            else:
                batch[key] = torch.tensor(values)
        return batch

    def templated(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """Return a conversation in the chat template of the tokenizer, or of the processor of its images.

        Its tokens are a list; what the processor makes besides is a batch of one.
        """
        reader, name = (self.processor, "processor") if self.processor else (self.tokenizer, "tokenizer")
        if not reader.chat_template:
            raise StatisticsError(f"the {name} has no chat template; give the data as plain text (--text)")
        how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        try:
            found = dict(reader.apply_chat_template(messages, **how, **options))
        except Exception as error:  # a template is a program, which raises what it likes
            raise StatisticsError(
                f"the {name}'s chat template does not take a conversation of {', '.join(m['role'] for m in messages)}: "
                f"{error}; leave such conversations out"
            ) from error
        ids = found.pop("input_ids")[0].tolist()
        return {"input_ids": ids, **found} if self.processor else {"input_ids": ids}

    def masks(self, batch: dict[str, Any]) -> list[Tensor]:
        """Return the masks ``[batch, length]`` of the tokens that count: the encoder's (or only) and the decoder's."""
        masks = []
        masked = {**batch, **self.classes}
        if "attention_mask" in masked:
            masks.append(masked["attention_mask"].bool().flatten(0, -2))  # choices are a batch inside of the model
        if self.task.per_token and self.config.is_encoder_decoder and "labels" in batch:
            masks.append(batch["labels"] != IGNORED)
        return masks

    def forward(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """Return the model's outputs for a batch."""
        classes = {key: value.to(next(iter(batch.values())).device) for key, value in self.classes.items()}
        left_out = ("labels",) if classes or self.task.of_span else ()
        return model(**{key: value for key, value in batch.items() if key not in left_out}, **classes)

    def logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the model's logits for a batch: ``[batch, (tokens,) labels]``, of spans ``[batch, 2, tokens]``."""
        output = self.forward(model, batch)
        if self.task.of_span:
            if getattr(output, "start_logits", None) is None:
                raise StatisticsError(
                    f"a {type(model).__name__} does not tell where answers begin and end token by token"
                )
            both = torch.stack([output.start_logits, output.end_logits], 1)
            return (
                both.masked_fill(~batch["attention_mask"].bool()[:, None], -math.inf)
                if "attention_mask" in batch
                else both
            )
        return output.logits_per_image if self.classes else output.logits

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the sum over the batch's examples of the model's own loss on each example alone."""
        if self.classes:  # of an image among the classes; the model's own loss is of pairs in a batch
            return nn.functional.cross_entropy(self.logits(model, batch).float(), batch["labels"], reduction="sum")
        if self.task.of_span:  # of which the model's own loss counts padding
            logits = self.logits(model, batch).float()
            return nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="sum") / 2
        output = self.forward(model, batch)
        if getattr(output, "loss", None) is None:
            raise StatisticsError(
                f"a {type(model).__name__} has no loss here, whose gradients this kind needs; measure Grams (--kind gram), "
                "or, of a part such as an encoder, name the whole model that it belongs to (--base)"
            )
        if not self.task.per_token:
            return output.loss.float() * len(batch["labels"])
        return self._token_losses(output.logits, batch["labels"]).sum()

    def _token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each example's mean negative log-likelihood of its tokens, ``[batch]``."""
        logits, labels = self.shifted(logits, labels)
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
        )
        return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)

    def _right_choices(self, model: nn.Module, size: int, device: torch.device | str) -> float:
        """Return the share of examples whose right choice is the likeliest of all by the mean over its tokens.

        The rank classification of Sanh et al. 2022, section 3, for lengths that differ (Liu et al. 2022, section 3.2).
        """
        rows = self.dataset.select_columns([*self.columns.choices, self.columns.label])
        counts = [len(choices_of(self.columns, row)) for row in rows]
        said = [(index, place) for index, count in enumerate(counts) for place in range(count)]
        losses: list[float] = []
        size = 1 if self.singly else size
        for start in range(0, len(said), size):
            features = [self._features(index, place) for index, place in said[start : start + size]]
            batch = {key: value.to(device) for key, value in self._padded(features).items()}
            losses += self._token_losses(self.logits(model, batch), batch["labels"]).tolist()
        right, left = 0, iter(losses)
        for row, count in zip(rows, counts, strict=True):
            own = list(islice(left, count))
            right += own.index(min(own)) == right_choice(self.columns, row)
        return right / max(len(counts), 1)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, batch_size: int = 64, device: torch.device | str = "cpu") -> float:
        """Return the share of labels (of tokens or choices, for language models) that `model` predicts, in [0, 1].

        Raises:
            StatisticsError: the model predicts numbers, not labels.

        """
        if self.task.of_path:
            raise StatisticsError("what frames tell has no labels of their own, so there is no accuracy; use the loss")
        if self.is_regression and not self.task.per_token:
            raise StatisticsError(
                "a regression head predicts numbers, of which there is no accuracy; compare them yourself"
            )
        several = not self.classes and self.config.problem_type == "multi_label_classification"
        model.eval()
        if self.columns.choices and self.task.per_token:
            return self._right_choices(model, batch_size, device)
        right = count = 0
        for batch in self.batches(batch_size, device):
            logits, labels = self.logits(model, batch), batch["labels"]
            if self.task.per_token:
                logits, labels = self.shifted(logits, labels)
            counted = labels != IGNORED
            predicted = (logits > 0).to(labels) if several else logits.argmax(-1)
            right += int((predicted == labels)[counted].sum())
            count += int(counted.sum())
        return right / max(count, 1)

    @property
    def is_regression(self) -> bool:
        """Whether the model predicts numbers."""
        return not self.classes and predicts_numbers(self.config)

    def shifted(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and labels of tokens, those of one place beside each other."""
        return (logits[:, :-1], labels[:, 1:]) if self._is_shifted else (logits, labels)

    @property
    def _is_shifted(self) -> bool:
        # A decoder alone predicts the next token; an encoder-decoder's logits already stand at their label's place.
        return not (self.config.is_encoder_decoder or self.task.in_place)


def plain_name(label: str) -> str:
    """Return a label's name without what names of the same label differ in: case, spaces and signs."""
    return "".join(filter(str.isalnum, str(label).lower()))


def predicts_numbers(config: Any) -> bool:
    """Tell whether a classifier's labels are numbers."""
    return config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
