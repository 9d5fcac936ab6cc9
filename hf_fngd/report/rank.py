"""`python -m hf_fngd rank FOLDER`: the effective rank of weights, or of what training changed.

The effective rank of a matrix with singular values σ is exp(-Σ p log p), p = σ/Σσ (Roy & Vetterli
2007, EUSIPCO): between 1 and the smaller side, and that side only where all σ are equal. The rank
that a LoRA needs is the smallest one that keeps a share of Σσ² of the change.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tabulate import tabulate  # type: ignore[import-untyped]
from torch import Tensor

from hf_fngd import FNGDError
from hf_fngd.report.plots import plot_ranks

_WEIGHTS, _ADAPTER = "model.safetensors", "adapter_model.safetensors"
# Reads the matrix of a layer.
Read = Callable[[], Tensor]


@dataclass
class Spectrum:
    """Singular values σ of a layer's matrix.

    Attributes:
        layer: Path of the layer.
        shape: Shape of its matrix.
        values: σ, largest first.
    """

    layer: str
    shape: tuple[int, int]
    values: Tensor

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of σ/Σσ; 0 for a matrix of zeros."""
        total = float(self.values.sum())
        if total == 0:
            return 0.0
        shares = self.values / total
        return float(torch.special.entr(shares).sum().exp())

    def rank(self, share: float) -> int:
        """Return the smallest rank that keeps a share of Σσ²; 0 for a matrix of zeros.

        Args:
            share: Between 0 and 1.

        Returns:
            The rank.
        """
        energy = self.values.square().cumsum(0)
        if float(energy[-1]) == 0:
            return 0
        return int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1


def main(arguments: Sequence[str]) -> None:
    """Print the table, and write the rank pattern if `--rank_pattern` names a file.

    A folder without weights, or two that do not fit, end the program with exit code 2.

    Args:
        arguments: Words after `rank`.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _report(options)
    except FNGDError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_fngd rank",
        description="Print the effective rank of each matrix of a model or of a LoRA, or of its "
        "difference from the model that training started from, and the LoRA rank that keeps most "
        "of it. Embeddings and the vocabulary head are not LoRA's usual targets: see --match.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a saved model or adapter")
    parser.add_argument("--base", metavar="FOLDER", type=Path, help="the model before training")
    parser.add_argument(
        "--match", metavar="REGEX", default="", help="only layers whose path has a match of this"
    )
    parser.add_argument(
        "--share", type=float, default=0.9, help="share of the squared norm to keep (default: 0.9)"
    )
    parser.add_argument(
        "--budget",
        metavar="R",
        type=int,
        help="with --rank_pattern: share out the parameters that a LoRA of rank R has in these "
        "layers, so that they keep the most; default: the ranks of the table",
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the ranks as a PNG picture")
    parser.add_argument(
        "--rank_pattern", metavar="FILE", type=Path, help="write the ranks as JSON for LoraConfig"
    )
    return parser


def allocate(found: Sequence[Spectrum], rank: int) -> dict[str, int]:
    """Share out the parameters of a LoRA among layers, so that they keep the most of Σσ².

    A rank of a `[d_out, d_in]` matrix costs d_out + d_in parameters. Every layer has rank 1 at
    least; the rest goes to the singular values with the largest σ² per parameter.

    Args:
        found: The layers' spectra.
        rank: Rank of the LoRA whose parameters are shared out.

    Returns:
        Ranks by layer.
    """
    costs = {one.layer: sum(one.shape) for one in found}
    left = (rank - 1) * sum(costs.values())
    parts = [
        (float(value) ** 2 / costs[one.layer], one.layer)
        for one in found
        for value in one.values[1:]
    ]
    pattern = dict.fromkeys(costs, 1)
    for _, layer in sorted(parts, key=lambda part: -part[0]):
        if costs[layer] <= left:
            pattern[layer] += 1
            left -= costs[layer]
    return pattern


def _report(options: argparse.Namespace) -> None:
    if not 0 < options.share < 1:
        raise FNGDError(f"--share must lie between 0 and 1, not {options.share:g}")
    if options.budget is not None and (options.budget < 1 or options.rank_pattern is None):
        raise FNGDError("--budget must be a rank of at least 1, and needs --rank_pattern FILE")
    found = spectra(options.folder, options.base, options.match)
    ranks = [one.rank(options.share) for one in found]
    kept = f"rank for {options.share:.0%}"
    rows = [
        {
            "layer": one.layer,
            "matrix": "x".join(map(str, one.shape)),
            "effective rank": f"{one.effective_rank:.1f}",
            kept: rank,
        }
        for one, rank in zip(found, ranks, strict=True)
    ]
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    what = "its change" if options.base else "its matrix"
    print(
        f"\nThe LoRA rank that keeps {options.share:.0%} of the squared norm of {what} is "
        f"{statistics.median(ranks):g} for the median layer and {max(ranks)} at most."
    )
    if options.plot is not None:
        sides = [min(one.shape) for one in found]
        label = f"{kept}, as a share of the smaller side"
        _write(
            "--plot",
            options.plot,
            partial(
                plot_ranks,
                names=[one.layer for one in found],
                ranks=ranks,
                sides=sides,
                label=label,
            ),
        )
    if options.rank_pattern is not None:
        if options.budget is not None:
            pattern = allocate(found, options.budget)
        else:
            # A LoRA has at least rank 1.
            pattern = {one.layer: max(1, rank) for one, rank in zip(found, ranks, strict=True)}
        text = json.dumps(pattern, indent=2) + "\n"
        write = partial(Path.write_text, data=text, encoding="utf-8")
        _write("--rank_pattern", options.rank_pattern, write)


def _write(option: str, path: Path, write: Callable[[Path], Any]) -> None:
    try:
        write(path)
    except OSError as error:
        raise FNGDError(f"{option}: cannot write {str(path)!r}: {error.strerror}") from None
    print(f"written: {path}")


def spectra(folder: Path, base: Path | None = None, match: str = "") -> list[Spectrum]:
    """Find the singular values of every matrix of a model, or of its change.

    Args:
        folder: Folder of a model or of a LoRA adapter, in safetensors.
        base: Folder of the model before training; a layer that it lacks is left out.
        match: Regular expression that a layer's path has to contain.

    Returns:
        One for each layer, in the order of their paths. Singular values come from the eigenvalues
        of the smaller Gram matrix in float64, so those below 1e-8 of the largest are rounding.

    Raises:
        FNGDError: For folders that cannot be read, do not fit, or hold weights that are not finite.
    """
    try:
        wanted = re.compile(match)
    except re.error as error:
        raise FNGDError(f"--match: {match!r} is not a regular expression ({error})") from None
    if base is not None and (folder / _ADAPTER).is_file():
        raise FNGDError(f"{str(folder)!r} is an adapter, which is a change: leave --base out")
    with ExitStack() as files:
        matrices = _matrices(folder, files)
        before = None if base is None else _matrices(base, files)
        found = []
        for layer in sorted(filter(wanted.search, matrices)):
            if before is not None and layer not in before:
                continue
            matrix = matrices[layer]()
            if before is not None:
                start = before[layer]()
                if start.shape != matrix.shape:
                    raise FNGDError(
                        f"{layer} is {[*matrix.shape]} in {str(folder)!r} and {[*start.shape]} in "
                        f"{str(base)!r}: give the model that training started from"
                    )
                matrix = matrix - start
            if not bool(matrix.isfinite().all()):
                raise FNGDError(f"{layer} has values that are not finite: is the training broken?")
            found.append(Spectrum(layer, (matrix.shape[0], matrix.shape[1]), singular(matrix)))
    if not found:
        both = f" and {str(base)!r}" if base is not None else ""
        raise FNGDError(
            f"no matrix of {str(folder)!r}{both} fits --match {match!r}: leave it out, or give "
            "folders of the same architecture"
        )
    return found


def singular(matrix: Tensor) -> Tensor:
    """Return singular values in float64, largest first.

    Args:
        matrix: `[d_out, d_in]`.

    Returns:
        `[min(d_out, d_in)]`.
    """
    rows = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().t()
    return torch.linalg.eigvalsh(rows @ rows.t()).clamp(min=0).sqrt().flip(0)


def _matrices(folder: Path, files: ExitStack) -> dict[str, Read]:
    """Find a folder's matrices without reading them; a kernel counts as `[d_out, rest]`."""
    adapter = (folder / _ADAPTER).is_file()
    paths = [folder / _ADAPTER] if adapter else _shards(folder)
    readers: dict[str, Read] = {}
    for path in paths:
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise FNGDError(f"cannot read {str(path)!r}: {error}") from None
        for name in file.keys():
            shape = file.get_slice(name).get_shape()
            if len(shape) > 1 and min(shape[0], shape[1]) > 1 - adapter:
                readers[name] = partial(_read, file, name)
    if adapter:
        return dict(_products(folder, readers))
    return {name.removesuffix(".weight"): read for name, read in readers.items()}


def _read(file: Any, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    return tensor.float().flatten(1)


def _shards(folder: Path) -> list[Path]:
    index = folder / f"{_WEIGHTS}.index.json"
    try:
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in sorted(set(names))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FNGDError(f"{str(index)!r} is not an index of weights: {error!r}") from None
    if not (folder / _WEIGHTS).is_file():
        raise FNGDError(
            f"there is no {_WEIGHTS} and no {_ADAPTER} in {str(folder)!r}: give the folder of a "
            "model or adapter that `save_pretrained` wrote"
        )
    return [folder / _WEIGHTS]


def _products(folder: Path, readers: Mapping[str, Read]) -> Iterator[tuple[str, Read]]:
    """Yield what an adapter adds to each layer, up to a factor that changes no rank."""
    for name, read_a in readers.items():
        prefix, separator, suffix = name.partition(".lora_A.")
        read_b = readers.get(f"{prefix}.lora_B.{suffix}")
        if separator and read_b is not None:
            layer = prefix.removeprefix("base_model.model.")
            yield layer, partial(_product, read_b, read_a)


def _product(first: Read, second: Read) -> Tensor:
    return first() @ second()
