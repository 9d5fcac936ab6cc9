"""Write the model card of a run again, from its metrics.json.

    python scripts/write_card.py model_cards/tatoeba-demo

Text outside the marks of hf_fngd and metadata that a person added stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from common.facts import card_facts

from hf_fngd.report.card import write_card


def main(words: list[str]) -> int:
    """Write the cards; a folder without a finished run ends the program with exit code 2.

    Args:
        words: Output folders of runs.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(
        prog="write_card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="folder of a run")
    for folder in parser.parse_args(words).folders:
        try:
            found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            facts = card_facts(found, folder)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{folder} has no finished run of these scripts: {error!r}")
        print(f"written: {write_card(folder, facts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
