"""The front page and those of the studies."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "scripts/bench/README.md", "scripts/plans/README.md")
}
