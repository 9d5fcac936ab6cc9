"""Measure step time and peak memory of FNGD against AdamW(fused=True), on all shapes of the page.

    python scripts/bench/all_shapes.py --output scripts/bench/results/step_time

For each shape step_time.py runs in a separate process and writes OUTPUT/NAME.json; for those in
MEMORY memory.py writes OUTPUT/../memory/NAME.json.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from measure import parse

HERE = Path(__file__).resolve().parent
_PAPER = "--d_model 512 --ffn_dim 2048 --layers 6"
# Flags of the workload, and timed rounds: fewer where a step takes seconds.
SHAPES = {
    "marian_256_b64": ("", 20),
    "marian_512_b32": (f"{_PAPER} --batch_size 32", 12),
    "marian_512_b64": (f"{_PAPER} --batch_size 64", 8),
    "marian_512_b128": (f"{_PAPER} --batch_size 128", 5),
    "marian_512_b32_bf16": (f"{_PAPER} --batch_size 32 --bf16", 8),
    "opus_mt_b32": (f"{_PAPER} --batch_size 32 --vocab_size 58101", 9),
    "gpt2_blocks_b8": (
        "--shapes gpt2 --d_model 768 --ffn_dim 3072 --layers 2 --batch_size 8 --length 512",
        3,
    ),
    "resnet18_b128": ("--shapes resnet18 --batch_size 128", 5),
    "lora_7b_block_b4": (
        "--shapes lora --d_model 4096 --ffn_dim 11008 --layers 1 --batch_size 4 --length 128",
        8,
    ),
}
MEMORY = ("marian_512_b32", "resnet18_b128", "gpt2_blocks_b8")


@dataclass
class Options:
    """Shapes to measure, and the folder."""

    output: str = field(metadata={"help": "Folder for the results."})
    only: list[str] | None = field(
        default=None, metadata={"help": "Names of shapes; default: all.", "choices": list(SHAPES)}
    )
    flags: str = field(default="", metadata={"help": "Further flags of both benchmarks."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})


def run(script: str, words: str, output: Path) -> None:
    """Run a benchmark in a separate process."""
    print(f"{output.stem}: {script}", flush=True)
    command = [sys.executable, str(HERE / script), *words.split(), "--output", str(output)]
    subprocess.run(command, check=True)


def main() -> None:
    """Run the benchmarks from the command line."""
    (options,) = parse([Options], __doc__)
    folder = Path(options.output)
    for name, (shape, repeats) in SHAPES.items():
        if options.only is None or name in options.only:
            last = f"--threads {options.threads} {options.flags}"
            words = f"{shape} --repeats {repeats} --warmup 1 {last}"
            run("step_time.py", words, folder / f"{name}.json")
            if name in MEMORY:
                words = f"{shape} --steps 3 {last}"
                run("memory.py", words, folder.parent / "memory" / f"{name}.json")


if __name__ == "__main__":
    main()
