"""paths.py: a URL in any setting or option that may be a path is refused with the reason."""

import pytest

from longfire.cli import main
from longfire.cli.arguments import Parser
from longfire.cli.commands import COMMANDS
from longfire.config.paths import refuse_url
from longfire.config.recipe import SETTINGS, Given, sections
from longfire.errors import SettingsError

URLS = (
    "s3://bucket/run",
    "S3://bucket/run",
    "gs://b/x.jsonl",
    "hf://datasets/owner/name",
    "http://host/x.jsonl",
    "https://host/x.jsonl",
    "s3:/bucket/run",
    "file:///tmp/x",
    "abfss://c@account/x",
    "hdfs:///x",
    "memory://x",
    "a.txt,s3://bucket/x.txt",
    "runs/s3://bucket",
    "simplecache::s3://bucket/x",
    "[s3://bucket/x]",
)
PATHS = (
    "runs/a",
    "/data/x.jsonl",
    "owner/name",
    "C:/data",
    "C://data",
    "a:b/c",
    "12:00/x",
    "~/x",
    "*.jsonl",
    "<|endoftext|>",
    "",
)


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_refused_with_what_to_do(url):
    with pytest.raises(
        SettingsError, match="is a URL, and longfire reads and writes local files only: .+"
    ):
        refuse_url(url, "job.dump_folder")


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_no_url(path):
    assert refuse_url(path, "job.dump_folder") == path


@pytest.mark.parametrize(
    "url",
    [
        "hf://datasets/owner/name",
        "https://huggingface.co/owner/name",
        "HTTPS://huggingface.co/owner/name",
        "https://huggingface.co/datasets/owner/name/tree/main",
    ],
)
def test_the_hub_is_named_without_its_address(url):
    with pytest.raises(SettingsError, match="of the hub as 'owner/name'"):
        refuse_url(url, "data.dataset")


TEXTS = [key for key, field in SETTINGS.items() if field.type in (str, tuple[str, ...])]
PROSE = {
    "job.description",
    "data.document_end",
    "data.field_separator",
    "data.split_documents",
    "eval.sample_prompt",
}


@pytest.mark.parametrize("key", TEXTS)
def test_every_setting_that_is_text_but_no_prose_refuses_one(key):
    """One rule: a new setting has it unless it says that it is prose."""
    given = {
        key: Given("https://host/x", "x.toml")
        if SETTINGS[key].type is str
        else Given(["https://host/x"], "x.toml")
    }
    if key in PROSE:
        sections(given)
        return
    with pytest.raises(SettingsError, match=f"x.toml: {key} = 'https://host/x' is a URL"):
        sections(given)


OPTIONS = {
    "eval": ["run", "--json", "--plot", "--data", "--include_path", "--plugins"],
    "generate": ["run", "--prompts", "--plugins"],
    "export": ["run", "out"],
    "import": ["source", "run"],
    "report": ["runs", "--out"],
    "convert": ["--model", "--config", "--output"],
    "init": ["recipe", "--data"],
    "train": ["recipe", "--job.config_file"],
    "prepare": ["recipe"],
    "plan": ["recipe", "--json"],
}


@pytest.mark.parametrize(
    ("command", "option"), [(name, option) for name, all in OPTIONS.items() for option in all]
)
def test_every_option_of_a_command_refuses_one(command, option, capsys):
    words = [option, "s3://bucket/x"] if option.startswith("--") else ["s3://bucket/x"]
    if option.startswith("--") and command != "init":
        words = [*words, *(["quickstart"] if command in ("train", "plan") else ["folder"])]
    if option == "out" or (command, option) == ("import", "run"):
        words = ["folder", *words]
    assert main([command, *words]) == 2
    assert "is a URL, and longfire reads and writes local files only" in capsys.readouterr().err


def test_prompts_may_hold_one():
    parser = Parser("x", COMMANDS["doctor"], "x")
    parser.add_argument("--prompt", is_prose=True)
    parser.add_argument("--count", type=int)
    assert parser.parse_words(["--prompt", "see https://host/x"]).prompt == "see https://host/x"
    with pytest.raises(SettingsError, match="invalid int value"):
        parser.parse_words(["--count", "many"])


def test_no_folder_is_made_of_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--job.dump_folder", "s3://b/r"]) == 2
    assert "job.dump_folder = 's3://b/r' is a URL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
