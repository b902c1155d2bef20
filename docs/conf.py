"""The site's settings: `sphinx-build -W docs site` (extra `docs`)."""

import shutil
from pathlib import Path

project = "qwen-moe-jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "qwen-moe-jax"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_use_rtype = False
nitpicky = False

# Pages that lie elsewhere in the repository are copied, so that there is one of each.
_HERE = Path(__file__).parent
_GENERATED = _HERE / "generated"
_GENERATED.mkdir(exist_ok=True)
for source, name in (
    ("ARCHITECTURE.md", "architecture.md"),
    ("benchmarks/README.md", "benchmarks.md"),
    ("checkpoints/README.md", "checkpoints.md"),
):
    shutil.copyfile(_HERE.parent / source, _GENERATED / name)
pictures = _GENERATED / "abacus"
pictures.mkdir(exist_ok=True)
for picture in (_HERE.parent / "checkpoints" / "abacus").glob("*.png"):
    shutil.copyfile(picture, pictures / picture.name)
suppress_warnings = ["myst.xref_missing"]  # of copied pages, whose links are to files beside the originals
