"""A filled notebook as one HTML file."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.record.files import write_text
from lib.record.paths import ArtifactError, display_path

if TYPE_CHECKING:
    from nbformat import NotebookNode


MAX_ERROR_LENGTH = 2000


PAGE_TEMPLATE = Path(__file__).resolve().parent / "site_assets" / "notebook.html.j2"


# On the page alone: a long list in front of the summary folds; and an empty head, which Markdown asks of every table,
# goes. Both stand in our own cells; in what a model wrote "<" is escaped.
CONTENTS_LIST = re.compile(r"<p><strong>Contents</strong></p>\s*(<ul>.*?</ul>)", re.DOTALL)


FOLDED_CONTENTS = r'<details class="contents"><summary>Contents</summary>\1</details>'


EMPTY_TABLE_HEAD = re.compile(r"<thead>\s*<tr>\s*(?:<th></th>\s*)+</tr>\s*</thead>")


def write_html(notebook: Path) -> Path:
    """The filled notebook, which was cleaned when it was saved, as one self-contained HTML file beside it.

    Raises:
        ArtifactError: it is no valid notebook.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    content = nbformat.read(notebook, as_version=4)
    _check_form(content, notebook)
    # Defaults that injected values replaced would only be read as this run's own; the notebook keeps them.
    injected = any("injected-parameters" in cell.metadata.get("tags", []) for cell in content.cells)
    unread = {"parameters"} if injected else set()
    config = Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": unread})
    exporter = HTMLExporter(
        config=config,
        template_name="lab",
        template_file=str(PAGE_TEMPLATE),
        embed_images=True,
        # Before those of $JUPYTER_PATH and of the home folder, which belong to another nbconvert.
        extra_template_basedirs=[str(Path(sys.prefix, "share", "jupyter", "nbconvert", "templates"))],
    )
    # Two assets that the template would load from a network: reports are read on machines without one.
    exporter.require_js_url = exporter.mathjax_url = ""
    content.metadata["title"] = _title(content, notebook.stem)
    body, _ = exporter.from_notebook_node(content)
    body = CONTENTS_LIST.sub(FOLDED_CONTENTS, EMPTY_TABLE_HEAD.sub("", body), count=1)
    # The notebook is cleaned, and nothing of this machine is added to it.
    target = notebook.with_suffix(".html")
    write_text(target, body)
    return target


def _check_form(content: "NotebookNode", notebook: Path) -> None:
    from nbformat import ValidationError, validate

    try:
        validate(content)
    except ValidationError as error:
        where = ".".join(map(str, error.absolute_path))
        fault = error.message.partition("\n")[0][:MAX_ERROR_LENGTH]
        raise ArtifactError(
            f"{display_path(notebook)} is no valid notebook at {where}: {fault}; run its stage again"
        ) from None


def _title(content: Mapping[str, Any], stage: str) -> str:
    run = content["metadata"].get("papermill", {}).get("parameters", {}).get("run_name", "")
    return f"{run} · {stage}" if run else stage
