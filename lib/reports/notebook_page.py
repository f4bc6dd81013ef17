"""A filled notebook as one HTML file that reads as a report: contents, results, code behind a switch."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lib.record.files import write_text
from lib.record.paths import ArtifactError, display_path
from lib.reports.pages import content_policy, note_page

if TYPE_CHECKING:
    from nbformat import NotebookNode

MAX_ERROR_LENGTH = 2000
PAGE_TEMPLATE = Path(__file__).resolve().parent / "site_assets" / "notebook.html.j2"
# Markdown asks every table for a head; ours can be empty. Only our own cells match: in model text "<" is escaped.
EMPTY_TABLE_HEAD = re.compile(r"<thead>\s*<tr>\s*(?:<th></th>\s*)+</tr>\s*</thead>")
# What no output needs, and a page's policy does not stop: a redirection, a look-up of a name, a page inside the page.
ACTIVE_TAG = re.compile(
    r"<(?=/?(?:script|meta|link|base|i?frame|frameset|fencedframe|object|embed)[\s/>])", re.IGNORECASE
)
SECTION_START = re.compile(r"^(?=## )", re.MULTILINE)


def write_html(notebook: Path) -> Path:
    """The filled notebook as one self-contained HTML file beside it; ArtifactError where it is not valid."""
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    content = nbformat.read(notebook, as_version=4)
    _check_form(content, notebook)
    # Defaults that injected values replaced would only be read as this run's own; the notebook keeps them.
    injected = any("injected-parameters" in cell.metadata.get("tags", []) for cell in content.cells)
    unread = {"parameters"} if injected else set()
    exporter = HTMLExporter(
        config=Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": unread}),
        template_name="lab",
        template_file=str(PAGE_TEMPLATE),
        embed_images=True,
        # Before those of $JUPYTER_PATH and of the home folder, which belong to another nbconvert.
        extra_template_basedirs=[str(Path(sys.prefix, "share", "jupyter", "nbconvert", "templates"))],
    )
    run = content.metadata.get("papermill", {}).get("parameters", {}).get("run_name", "")
    content.metadata["title"] = f"{run} · {notebook.stem}" if run else notebook.stem
    sections = [section for section in _sections(content.cells) if not _is_silent(section)]
    content.cells = [cell for section in sections for cell in section]
    contents = [section[0].source.splitlines()[0].removeprefix("## ") for section in sections[1:]]
    resources = {"contents": contents, "policy": content_policy()}
    page, _ = exporter.from_notebook_node(content, resources=resources)
    head, end, body = page.partition("</head>")
    target = notebook.with_suffix(".html")
    write_text(target, head + end + ACTIVE_TAG.sub("&lt;", EMPTY_TABLE_HEAD.sub("", body)))
    note_page(target)
    return target


def _check_form(content: "NotebookNode", notebook: Path) -> None:
    from nbformat import ValidationError, validate

    try:
        validate(content)
    except ValidationError as error:
        where = ".".join(map(str, error.absolute_path))
        fault = error.message.partition("\n")[0][:MAX_ERROR_LENGTH]
        raise ArtifactError(
            f"{display_path(notebook)} is not a valid notebook at {where}: {fault}; run its stage again"
        ) from None


def _sections(cells: Sequence["NotebookNode"]) -> "list[list[NotebookNode]]":
    """Cells up to the first second-level heading, then one list per heading; a cell with a heading inside is split."""
    from nbformat.v4 import new_markdown_cell

    sections: list[list[NotebookNode]] = [[]]
    for cell in cells:
        if cell.cell_type != "markdown":
            sections[-1].append(cell)
            continue
        for part in filter(None, SECTION_START.split(cell.source)):
            if part.startswith("## "):
                sections.append([])
            sections[-1].append(new_markdown_cell(part))
    return sections


def _is_silent(section: "Sequence[NotebookNode]") -> bool:
    """Whether a section has code and none of it shows anything: what it is about did not happen in this run."""
    code = [cell for cell in section if cell.cell_type == "code"]
    begins_with_heading = section and section[0].source.startswith("## ")
    return bool(begins_with_heading and code) and not any(cell.outputs for cell in code)
