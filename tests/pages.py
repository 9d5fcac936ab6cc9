"""The front page and those of the studies: their texts, and what they say in one line."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "bench" / "results"
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "scripts/bench/README.md", "scripts/plans/README.md")
}
# With one space between words, so that a sentence is found wherever its lines break.
SAID = " ".join(" ".join(PAGES.values()).split())
