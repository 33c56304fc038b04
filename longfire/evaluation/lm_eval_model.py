"""`longfire eval --tasks`: a model as EleutherAI's harness sees it (lm-eval, extra `eval`): its
tasks, our forward and generation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.table import Table

from longfire.checkpoint.weights import Opened
from longfire.config.options import Sampling, Scoring
from longfire.data.batch import Batch
from longfire.data.pack import NO_LABEL
from longfire.errors import DataError, SettingsError, first_line
from longfire.generation.continuation import Continuation, continuation_of
from longfire.generation.generate import begins_with_bos, written
from longfire.loss import losses
from longfire.plain_console import plain_console

SAMPLING_KEYS = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


# What lm-eval finds, by its names: "results", "versions", "n-shot", "n-samples"; of each task.
TaskResults = dict[str, dict[str, dict[str, object]]]


class AsLM(TemplateLM):
    """A model behind lm-eval's interface. max_length: tokens that it is shown at once; of more, the
    last are."""

    def __init__(
        self,
        opened: Opened,
        max_length: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.model = opened.model
        self.own_tokenizer = opened.tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.add_bos = begins_with_bos(opened) and self.own_tokenizer.bos_id is not None
        if self.add_bos:
            ends = [self.own_tokenizer.bos_id, self.own_tokenizer.eos_id]
        else:
            ends = [self.own_tokenizer.eos_id, self.own_tokenizer.bos_id]
        first, second = ends
        self.before = second if first is None else first

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text: BOS, or the EOS of the text before it."""
        if self.before is None:
            raise SettingsError(
                "the tokenizer has neither BOS nor EOS, which tasks need before a text without "
                "context"
            )
        return self.before

    @property
    def eot_token_id(self) -> int:
        """What stands after a text: EOS, if there is one."""
        if self.own_tokenizer.eos_id is None:
            return self.prefix_token_id
        return self.own_tokenizer.eos_id

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **_: object,
    ) -> list[int]:
        """The ids of a text, after BOS where the model's documents began with it."""
        ids = self.own_tokenizer.encode(string)
        wanted = self.add_bos and add_special_tokens is not False
        if wanted and ids[:1] != [self.own_tokenizer.bos_id]:
            return [self.prefix_token_id, *ids]  # which is BOS then
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[object, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """(log p(continuation), whether greedy decoding would write it) for (_, context,
        continuation) of each request."""
        texts: list[list[int]] = []
        answers: list[int] = []
        for _request, context, continuation in requests:
            text = (context + continuation)[-(self.max_length + 1) :]
            texts.append(text)
            answers.append(min(len(continuation), len(text) - 1))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        longest_first = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        for first in range(0, len(texts), self.batch_size):
            numbers = longest_first[first : first + self.batch_size]
            batch_texts = [texts[number] for number in numbers]
            batch_answers = [answers[number] for number in numbers]
            batch = self.scores(batch_texts, batch_answers)
            for number, score in zip(numbers, batch):
                scores[number] = score
        return scores

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def scores(
        self,
        texts: list[list[int]],
        answers: list[int],
    ) -> list[tuple[float, bool]]:
        """The same for the last `answers` ids of each text, as one batch. Shorter texts are padded
        on the right, which causal layers do not see."""
        batch = padded(texts, answers).to(self.model.embed.weight.device)
        nats_BT, right_BT = losses(self.model, batch)
        right_BT |= batch.labels_BT == NO_LABEL
        scores: list[tuple[float, bool]] = []
        nats_B = nats_BT.double().sum(1).tolist()
        right_B = right_BT.all(1).tolist()
        for nats, right in zip(nats_B, right_B):
            scores.append((-nats, right))
        return scores

    def loglikelihood_rolling(
        self,
        requests: list[Instance],
        disable_tqdm: bool = False,
    ) -> list[float]:
        """log p of whole texts, in windows of max_length that do not overlap."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for window in rolling:
                context, continuation = make_disjoint_window(window)
                windows.append((number, context, continuation))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows)
        for (number, _, _), (logp, _) in zip(windows, scores):
            totals[number] += logp
        return totals

    def generate_until(
        self,
        requests: list[Instance],
        disable_tqdm: bool = False,
    ) -> list[str]:
        """The continuation of each context, up to a stop; several requests together, if they have
        the same settings."""
        texts = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            settings = str(sorted(request.args[1].items()))
            by_settings.setdefault(settings, []).append(number)
        for numbers in by_settings.values():
            sampling = sampling_of(requests[numbers[0]].args[1])
            for first in range(0, len(numbers), self.batch_size):
                some = numbers[first : first + self.batch_size]
                batch: list[Continuation] = []
                for number in some:
                    batch.append(self.continuation(requests[number], sampling, number))
                for number, text in zip(some, written(self.model, batch)):
                    texts[number] = text
        return texts

    def continuation(
        self,
        request: Instance,
        sampling: Sampling,
        number: int,
    ) -> Continuation:
        """A request to generate_until, ready to be generated; of a long context its end."""
        room = max(1, self.max_length - sampling.max_new_tokens)
        ids = self.tok_encode(request.args[0])[-room:] or [self.prefix_token_id]
        return continuation_of(
            self.model,
            self.own_tokenizer,
            ids,
            sampling,
            number,
        )


def padded(texts: list[list[int]], answers: list[int]) -> Batch:
    """Texts as one batch, in which only the last `answers` ids of each have labels."""
    longest = max(map(len, texts))
    ids_BT = torch.zeros((len(texts), longest), dtype=torch.long)
    labels_BT = torch.full((len(texts), longest - 1), NO_LABEL)
    for number, (ids, answer) in enumerate(zip(texts, answers)):
        end = len(ids) - 1  # labels are one token behind
        ids_BT[number, : len(ids)] = torch.tensor(ids)
        labels_BT[number, end - answer : end] = torch.tensor(ids[len(ids) - answer :])
    positions_BT = torch.arange(longest - 1).expand(len(texts), -1)
    return Batch(ids_BT[:, :-1], labels_BT, positions_BT)


def sampling_of(wishes: Mapping[str, object]) -> Sampling:
    """lm-eval's generation_kwargs as ours. Raises SettingsError for one that has no meaning
    here."""
    kwargs = dict(normalize_gen_kwargs(dict(wishes), default_max_gen_toks=256))
    stop = tuple(filter(None, kwargs.pop("until")))
    tokens = kwargs.pop("max_gen_toks")
    draws = kwargs.pop("do_sample")
    unknown = kwargs.keys() - SAMPLING_KEYS
    if unknown:
        raise SettingsError(
            f"generation_kwargs of a task: {', '.join(sorted(unknown))} has no meaning here; "
            "leave it out"
        )
    sampling = Sampling(
        max_new_tokens=tokens,
        stop=stop,
        temperature=0.0,
    )
    if draws:
        sampling = replace(sampling, **{"top_k": 0, "temperature": 1.0, **kwargs})
    return sampling


def run_tasks(
    opened: Opened,
    scoring: Scoring,
    max_length: int,
) -> TaskResults:
    """lm-eval's numbers of the tasks. Raises SettingsError for a task that is not known, DataError
    for data that are not here."""
    manager = TaskManager(include_path=scoring.include_path or None)
    unknown: list[str] = []
    for task in scoring.tasks:
        if not manager.match_tasks([task]):
            unknown.append(task)
    if unknown:
        raise SettingsError(
            f"--tasks {','.join(unknown)}: lm-eval has no such task; `lm-eval ls tasks` lists "
            "them, --include_path adds yours"
        )
    try:
        found = simple_evaluate(
            AsLM(opened, max_length, scoring.batch_size),
            tasks=list(scoring.tasks),
            task_manager=manager,
            num_fewshot=None if scoring.num_fewshot < 0 else scoring.num_fewshot,
            limit=scoring.limit or None,
            log_samples=False,
        )
    except OSError as error:  # also what the hub's libraries raise offline
        raise DataError(
            f"--tasks {','.join(scoring.tasks)}: data cannot be read "
            f"({first_line(error, None)}); put them here, or let lm-eval fetch them with "
            "--allow_download"
        ) from error
    names = ("results", "versions", "n-shot", "n-samples")
    return {name: found[name] for name in names}


def show_tasks(found: TaskResults) -> None:
    """A table on the terminal, a line for each metric."""
    table = Table("task", "version", "shots", "metric")
    table.add_column("value", justify="right")
    table.add_column("± standard error", justify="right")
    for task, numbers in found["results"].items():
        for key, value in numbers.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{variant}")
            text = ""
            if isinstance(error, float):
                text = f"{error:.4f}"
            if variant != "none":
                metric = f"{metric} ({variant})"
            table.add_row(
                task,
                str(found["versions"].get(task, "")),
                str(found["n-shot"].get(task, "")),
                metric,
                f"{value:.4f}",
                text,
            )
    plain_console().print(table)
