"""The pages that readers see, by path."""

from tests.script_utils import script
from tests.test_runner import ROOT

with script(ROOT / "scripts" / "tables.py") as tables:
    PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in tables.PAGES}
