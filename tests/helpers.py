"""Oracles shared by the tests: loops over single samples, dense solves, and tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from hf_fngd.solve import gram


def sample_gradients(
    share: Callable[[int], Tensor], parameters: Sequence[Tensor], count: int
) -> list[Tensor]:
    """Return gradients of single samples by a loop: for each parameter `[count, *shape]`.

    `share(i)` is sample i's share of the batch's loss; u_i is the gradient of count x that share.
    """
    rows = [torch.autograd.grad(share(i) * count, parameters) for i in range(count)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def natural_gradient(u: Sequence[Tensor], damping: float, relative: bool = False) -> list[Tensor]:
    """Solve λ(λI + UUᵀ/N)⁻¹M densely, for one block of parameters given by sample_gradients."""
    count = len(u[0])
    flat = torch.cat([part.reshape(count, -1) for part in u], 1).t()
    if relative:
        damping = damping * float((flat * flat).sum()) / count**2
    eye = torch.eye(len(flat), dtype=flat.dtype)
    step = damping * torch.linalg.solve(damping * eye + flat @ flat.t() / count, flat.mean(1))
    sizes = [part[0].numel() for part in u]
    return [s.view(part.shape[1:]) for s, part in zip(step.split(sizes), u, strict=True)]


def gamma_of(gram: Tensor, damping: float) -> Tensor:
    """Solve γ = λ(λI + K/N)⁻¹1 densely, with λ relative to the mean eigenvalue of K/N."""
    n = len(gram)
    scale = damping * float(gram.trace()) / n**2
    eye = torch.eye(n, dtype=gram.dtype)
    return scale * torch.linalg.solve(scale * eye + gram / n, torch.ones(n, dtype=gram.dtype))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all gradients by parameter name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], **tolerance: float) -> None:
    """Compare two dicts of tensors, bit for bit unless atol and rtol are given."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value,
            second[name],
            **(tolerance or {"rtol": 0, "atol": 0}),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def fill_store(
    optimizer: torch.optim.Optimizer, ids: Iterable[int] = (), value: float = 1.0
) -> None:
    """Put one value into every entry of the store, and enter an epoch that reuses it."""
    rows = None
    if optimizer.config.share == "sample":
        rows = optimizer.store.locate(list(ids), create=True)
    shape = (1 if rows is None else len(rows), len(optimizer.layer_names))
    optimizer.store.write(rows, torch.full(shape, value))
    optimizer.start_epoch(1)


@contextmanager
def gram_route(route: str) -> Iterator[None]:
    """Form Gram matrices by one route (direct or hadamard), or by the one that is chosen (auto)."""
    if route == "auto":
        yield
        return
    with mock.patch.object(gram, "choose_route", return_value=route) as chosen:
        yield
    assert chosen.called, "no Gram matrix was formed"


def tiny_marian() -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    return MarianMTModel(
        MarianConfig(
            vocab_size=24,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=12,
            decoder_ffn_dim=12,
            max_position_embeddings=16,
            dropout=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            forced_eos_token_id=1,
        )
    )


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=24,
            n_positions=16,
            n_embd=8,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def tiny_llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


def tiny_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            layer_type="basic",
            num_labels=3,
        )
    )


def padded_tokens(lengths: Sequence[int], vocabulary: int = 24) -> tuple[Tensor, Tensor]:
    """Return random token ids padded with 0 to the longest, and their attention mask."""
    mask = torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.randint(3, vocabulary, mask.shape) * mask
    return tokens, mask.long()
