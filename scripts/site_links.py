"""A hook of mkdocs.yml: what pages of docs/ link to outside of docs/ becomes part of the site, so that no link is dead.

A page of Markdown (CONTRIBUTING.md) becomes a page, a picture is copied, any other file becomes a page that shows its text.
They lie under `repository/`, and links to them, and from them, are rewritten. A link to what is not in the repository stays
as it is: `mkdocs build --strict` then names it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = "docs/"
PLACE = "repository/"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
PICTURES = (".svg", ".png")
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each file outside of docs/ that a page links to, and those that these link to."""
    todo = [DOCS + file.src_uri for file in files if file.is_documentation_page()]
    seen = set(todo)
    while todo:
        page = todo.pop()
        for _, target, _ in LINK.findall((REPOSITORY / page).read_text(encoding="utf-8")):
            path = in_repository(page, target)
            if path in seen or not (REPOSITORY / path).is_file():
                continue
            seen.add(path)
            if not path.startswith(DOCS):
                files.append(site_file(path, config))
            if path.endswith(".md"):
                todo.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links go to the places that files have on the site."""
    here = page.file.src_uri
    source = here.removeprefix(PLACE) if here.startswith(PLACE) else DOCS + here

    def rewritten(found: re.Match[str]) -> str:
        path = in_repository(source, found[2])
        if not (REPOSITORY / path).is_file():
            return found[0]
        return found[1] + posixpath.relpath(place_of(path), posixpath.dirname(here)) + found[3]

    return LINK.sub(rewritten, markdown)


def in_repository(page: str, target: str) -> str:
    """The path of what a page links to, from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def place_of(path: str) -> str:
    """Where a file of the repository lies on the site."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    is_as_it_is = path.endswith((".md", *PICTURES))
    return PLACE + path + ("" if is_as_it_is else ".md")


def site_file(path: str, config: MkDocsConfig) -> File:
    file = REPOSITORY / path
    if path.endswith(PICTURES):
        return File.generated(config, place_of(path), content=file.read_bytes())
    text = file.read_text(encoding="utf-8")
    if not path.endswith(".md"):
        text = f"# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text}\n````\n"
    return File.generated(config, place_of(path), content=text)
