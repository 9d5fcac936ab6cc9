"""The pages that readers see, by path."""

from tests.hf.test_runner import ROOT
from tests.scripts.script_utils import script

with script(ROOT / "scripts" / "tables.py") as tables:
    PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in tables.PAGES}
