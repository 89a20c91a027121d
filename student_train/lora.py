"""Adapters of low rank beside frozen weights: what `peft` does, and how it ends in an ordinary model.

Source: Hu et al., LoRA, arXiv 2106.09685: W + (alpha / rank) · B·A, with B = 0 at the start.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shared.errors import ConfigError
from student_train.config import LoraSettings

ADAPTER = "default"


def add_adapters(model: Any, settings: LoraSettings) -> Any:
    """Put adapters into the model's layers and freeze all else.  Returns peft's own view of the same model.

    Raises:
        ConfigError: peft is not there, or the model has no such layers, or the output matrix is among them.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"student.lora needs peft, which cannot be imported: {error}", next_step="pip install 'logitferry[lora]'"
        ) from None
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  it is annotated as a whole number
        lora_dropout=settings.dropout,
        target_modules=settings.modules or "all-linear",
    )
    output = model.get_output_embeddings()
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"student.lora.modules: {type(model).__name__} cannot be given these adapters: {reason}",
            next_step="name ends of its linear layers, as q_proj; or leave modules away and take all of them",
        ) from None
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_base_layer")}
    for name in settings.modules or []:
        if not any(f".{each}".endswith(f".{name}") for each in layers):
            raise ConfigError(
                f"student.lora.modules: {type(model).__name__} has no layer whose name ends in {name}",
                next_step="name ends of its linear layers, as q_proj",
            )
    for name, layer in layers.items():
        if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            raise ConfigError(
                f"student.lora.modules takes in {name}, which is no linear layer: it could not be merged",
                next_step="leave it out",
            )
    if model.get_output_embeddings() is not output:
        raise ConfigError(
            "student.lora.modules takes in the output matrix, which the loss multiplies with by itself",
            next_step="leave it out; what stands before it can be adapted",
        )
    return adapted


def add_merged(model: Any, adapted: Any, weights: Mapping[str, Tensor]) -> None:
    """Add what the adapters came to say to the weights of a model without any; `weights` are those of the one with."""
    for name, layer in adapted.get_base_model().named_modules():
        if not hasattr(layer, "lora_A") or ADAPTER not in layer.lora_A:
            continue
        down_RI, up_OR = (weights[f"{name}.{part}.{ADAPTER}.weight"].cpu().float() for part in ("lora_A", "lora_B"))
        delta_OI = layer.scaling[ADAPTER] * (up_OR @ down_RI)
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(weight.float() + (delta_OI.T if layer.fan_in_fan_out else delta_OI))


def save_adapters(adapted: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """The adapters alone, as peft keeps them."""
    ours = {f"base_model.model.{name}": value for name, value in weights.items()}
    adapted.save_pretrained(str(folder), state_dict=ours, safe_serialization=True)
