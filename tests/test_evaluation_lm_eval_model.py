"""tasks.py: the same numbers as lm-eval's own adapter gives for the same weights; a task of one's own, without a network."""

import json

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from longfire.checkpoint.weights import open_model
from longfire.cli import main as longfire
from longfire.config.options import Sampling, Scoring
from longfire.data.tokenizer import train_tokenizer
from longfire.errors import DataError, SettingsError
from longfire.evaluation.lm_eval_model import AsLM, sampling_of
from longfire.evaluation.scores import main
from longfire.generation.generate import generate
from longfire.huggingface.export import export

pytestmark = pytest.mark.dtype

TEXTS = [
    "The fire of the firemen is hot and far",
    "naïve forests burn",
    "a",
    "12345 12345 12345 fire and forest and fire of men",
]
MAX_LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from conftest import tiny_model

    folder = tmp_path_factory.mktemp("tasks") / "hf"
    export(tiny_model("attention", vocab_size=300), train_tokenizer(TEXTS * 5, 300), folder)
    return folder


@pytest.fixture(scope="module")
def sides(folder):
    """Ours, and lm-eval's adapter of transformers, which puts the same token before a text that has nothing before it."""
    ours = AsLM(open_model(folder), MAX_LENGTH, batch_size=3)
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        max_length=MAX_LENGTH,
        batch_size=2,
        device="cpu",
        prefix_token_id=ours.prefix_token_id,
        add_bos_token=False,
    )
    return ours, theirs


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_likelihoods_of_continuations(sides):
    pairs = [(a, f" {b}") for a in ["", *TEXTS] for b in TEXTS]  # some are longer than max_length
    ours, theirs = (
        side.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) for side in sides
    )
    assert [greedy for _, greedy in ours] == [bool(greedy) for _, greedy in theirs]
    torch.testing.assert_close([p for p, _ in ours], [p for p, _ in theirs], rtol=1e-4, atol=1e-4)


def test_likelihoods_of_whole_texts_in_windows(sides):
    texts = [(text,) for text in [*TEXTS, " ".join(TEXTS)]]
    ours, theirs = (
        side.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
        for side in sides
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_texts_until_a_stop(sides):
    wishes = [
        {"until": ["e"], "max_gen_toks": 8, "do_sample": False},
        {"until": [], "max_gen_toks": 5},
    ]
    contexts = [(text, wish) for wish in wishes for text in TEXTS]
    ours, theirs = (
        side.generate_until(requests("generate_until", contexts), disable_tqdm=True)
        for side in sides
    )
    assert ours == theirs


def test_greedy_is_what_greedy_decoding_writes(sides):
    ours, before = sides[0], sides[0].tok_encode("fire")
    drawn = generate(ours.model, before, Sampling(max_new_tokens=6, temperature=0))
    other = [*drawn[:5], (drawn[5] + 1) % 300]
    found = ours._loglikelihood_tokens(
        [(None, before, drawn), (None, before, other), (None, before, drawn[:2])]
    )
    assert [greedy for _, greedy in found] == [True, False, True]


def test_wishes_of_tasks():
    drawn = sampling_of(
        {"until": ["a"], "do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7}
    )
    assert (drawn.max_new_tokens, drawn.temperature, drawn.top_k, drawn.top_p, drawn.stop) == (
        7,
        0.5,
        0,
        0.9,
        ("a",),
    )
    assert sampling_of({"until": None}).temperature == 0
    with pytest.raises(SettingsError, match="num_beams has no meaning"):
        sampling_of({"num_beams": 4})


TASK = """task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    """A folder with a task over questions on this process; what `datasets` keeps goes there too."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    questions = [
        {"question": f"{text} is", "choices": [" hot", " cold fire"], "answer": i % 2}
        for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/choice.yaml").write_text(
        TASK.replace("DATA", str(tmp_path / "questions.jsonl"))
    )
    return tmp_path / "own"


def test_a_task_of_ones_own_without_a_network(folder, own_task, tmp_path, monkeypatch, capsys):
    for name in (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HF_EVALUATE_OFFLINE",
        "TRANSFORMERS_OFFLINE",
    ):
        monkeypatch.setenv(name, "")  # what the command sets is taken back after the test
    words = f"eval {folder} --tasks own_choice --include_path {own_task} --json {tmp_path}/n.json --limit 3 --num_fewshot 0"
    assert longfire(words.split()) == 0
    import os

    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
    found = json.loads((tmp_path / "n.json").read_text())
    assert found["n-samples"]["own_choice"]["effective"] == 3
    ours = AsLM(open_model(folder), 2048, 8)
    pairs = [(f"{text} is", choice) for text in TEXTS[:3] for choice in (" hot", " cold fire")]
    scores = torch.tensor(
        [p for p, _ in ours.loglikelihood(requests("loglikelihood", pairs))]
    ).view(3, 2)
    expected = (scores.argmax(1) == torch.tensor([0, 1, 0])).float().mean().item()
    assert found["results"]["own_choice"]["acc,none"] == pytest.approx(expected)
    message = capsys.readouterr().out
    assert found["weights"] in message and "own_choice" in message and "acc_norm" in message


def test_tasks_that_are_not_known_or_not_here_are_named(folder, own_task, monkeypatch):
    with pytest.raises(SettingsError, match="--tasks nonsense_task: lm-eval has no such task"):
        main(folder, Scoring(tasks=("nonsense_task",), include_path=str(own_task)))
    (own_task.parent / "questions.jsonl").unlink()
    with pytest.raises(DataError, match="--allow_download"):
        main(folder, Scoring(tasks=("own_choice",), include_path=str(own_task)))
