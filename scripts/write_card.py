"""Writes the model card of a run anew from its metrics.json.

    python scripts/write_card.py model_cards/tatoeba-demo

Text outside our marks, and metadata that a person added, stay as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from common.facts import card_facts

from hf_fngd.report.card import write_card


def main(folders: list[str]) -> int:
    """Writes the cards.

    Args:
        folders: Output folders of runs.

    Returns:
        Exit code: 2 for a folder without a finished run.
    """
    if not folders:
        print(f"usage: python {sys.argv[0]} FOLDER...", file=sys.stderr)
        return 2
    for folder in map(Path, folders):
        try:
            found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            facts = card_facts(found, folder)
        except (OSError, ValueError, KeyError) as error:
            print(f"write_card: {folder} is no finished run of ours: {error!r}", file=sys.stderr)
            return 2
        print(f"written: {write_card(folder, facts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
