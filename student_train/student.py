"""The student: model, tokenizer, and the loss of some rows, one forward pass at a time."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from shared.device import compiles_every_shape, pick_dtype
from shared.errors import MismatchError
from shared.files import sync_folder, sync_tree
from shared.fingerprint import tokenizer_fingerprint
from shared.models import load_model, split_model
from shared.pretrained import context_tokens, load_tokenizer, model_identity
from student_train.attention import Attention, evaluating, settle_attention
from student_train.config import StudentSettings
from student_train.data_config import DataSettings
from student_train.flops import Flops
from student_train.lora import add_adapters, add_merged, save_adapters
from student_train.measures import Measures
from student_train.objective import Objective
from student_train.parallel import How, PassLoss, accumulating, layers_of, put_away, spread
from student_train.passes import ForwardPass, PassMaker
from student_train.ranks import Ranks
from student_train.run_folder import ADAPTER_FOLDER
from student_train.sources import Source, open_source


class Student:
    """A causal language model that is trained or measured, on one device or spread over those of several ranks.

    Raises:
        ConfigError, MismatchError: the model or its tokenizer cannot be used; see `shared.models`.
    """

    def __init__(
        self,
        settings: StudentSettings,
        device: torch.device,
        *,
        batch_tokens: int,
        chunk_positions: int | None = None,
        packing: bool = True,
        static_shapes: bool | None = None,
    ) -> None:
        self._settings, self._device, self._batch_tokens = settings, device, batch_tokens
        self.name = settings.model
        self.tokenizer: Any = load_tokenizer(settings)
        self.model: Any = load_model(settings, dtype=pick_dtype(settings.dtype), device=device)
        self._vocab_size = split_model(self.model)[1].vocab_size
        self._context_tokens = context_tokens(settings)
        self._adapted = add_adapters(self.model, settings.lora) if settings.lora else None
        self._is_static = compiles_every_shape(device) or settings.compile if static_shapes is None else static_shapes
        self.attention = (
            settle_attention(self.model, settings.attention, is_static=self._is_static) if packing else Attention(None)
        )
        self.flops = Flops.of(self.model)
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if settings.compile:
            self._compile()
        self._own = PassLoss(
            self.model,
            self.attention,
            chunk_positions=chunk_positions,
            compute_dtype=pick_dtype(settings.product_dtype) if settings.is_mixed else None,
        )
        self._spread: nn.Module = self._own

    def _compile(self) -> None:
        """Layer by layer: they are alike and compiled once, and what stands around them may do as it likes."""
        if self.attention.name is None:
            raise MismatchError(
                f"student.compile: {type(self.model).__name__} cannot be packed, so that every pass has another shape",
                next_step="set student.compile: false",
            )
        for layer in layers_of(self.model):
            layer.compile()

    def spread(self, how: How, ranks: Ranks) -> None:
        """Have all ranks train this student together from now on; before an optimizer gets its parameters."""
        self._spread = spread(self._own, how, ranks)

    def open_sources(self, settings: DataSettings) -> list[Source]:
        """Rows that are checked against this student's tokenizer, vocabulary and context."""
        return [
            open_source(
                source,
                self.tokenizer,
                vocab_size=self._vocab_size,
                context_tokens=self._context_tokens,
                cache=settings.cache,
            )
            for source in settings.sources()
        ]

    def pass_maker(self, objective: Objective, *, longest_row: int, ranks: Ranks) -> PassMaker:
        """Makes the forward passes of rows of at most so many tokens."""
        return PassMaker(
            objective=objective,
            shape=self.attention.shape(self._batch_tokens, longest_row, is_static=self._is_static),
            vocab_size=self._vocab_size,
            device=self._device,
            rank=ranks.rank,
            num_ranks=ranks.count,
        )

    def gradients(
        self, passes: Sequence[ForwardPass], objective: Objective, *, denominator: float
    ) -> tuple[Tensor, list[Measures]]:
        """Add the gradient of some passes to the parameters; their loss, and what was measured of each.

        `denominator` is the mean over ranks of Σ c over all that the gradient is taken over, so how rows were cut into
        passes changes nothing.  All ranks call it together, each with as many passes.
        """
        self.model.train()
        loss, found = torch.zeros((), device=self._device), []
        for number, each in enumerate(passes, start=1):
            on_device = each.to(self._device)
            with accumulating(self._spread, is_last=number == len(passes)):
                total, values_MN = self._spread(on_device, objective, denominator, False)
                total.backward()
            loss += total.detach()
            found.append(Measures(values_MN=values_MN, weight_N=on_device.targets.weight_N))
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return loss, found

    @torch.no_grad()
    def measured(self, passes: Sequence[ForwardPass], objective: Objective) -> Iterator[tuple[ForwardPass, Measures]]:
        """Every pass with what is to be seen in it, in detail; by all ranks together, each with as many passes."""
        # DDP has nothing to do where there is no gradient; FSDP2 has its weights to gather.
        module = self._own
        with evaluating(self.model):
            for each in passes:
                on_device = each.to(self._device)
                _, values_MN = module(on_device, objective, 1.0, True)
                yield each, Measures(values_MN=values_MN, weight_N=on_device.targets.weight_N)
        put_away(module)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: the weights it began with, how they compute, and the tokenizer."""
        settings = self._settings
        model = model_identity(settings, dtype=settings.dtype, engine="transformers")
        digests = {"config_sha256": model.config_sha256, "weights_sha256": model.weights_sha256}
        known = {"name": model.name, "revision": model.revision} if model.weights_sha256 is None else digests
        lora = settings.lora.model_dump(mode="json") if settings.lora else None
        return {
            "model": known | {"dtype": model.dtype, "compute_dtype": settings.compute_dtype, "lora": lora},
            "tokenizer": tokenizer_fingerprint(self.tokenizer.backend_tokenizer),
        }

    def save(self, folder: Path, ranks: Ranks, leave: Callable[[Path], None]) -> None:
        """A Hugging Face model with its tokenizer, by all ranks together; adapters are merged, and beside it alone.

        `leave` writes what else belongs into the folder, on the rank that writes.  Written aside and renamed: what has
        the name is whole.

        Raises:
            OSError: on the rank that writes.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = self.model.state_dict()
        if ranks.count > 1:
            weights = get_model_state_dict(self.model, options=options)
            # A tied weight that was gathered under both of its names is two tensors.
            named = (*self.model.named_parameters(), *self.model.named_buffers())
            weights = {name: weights[name] for name, _ in named if name in weights}
        if not ranks.is_first:
            return
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        model = self.model
        if self._adapted is not None:
            save_adapters(self._adapted, weights, folder.with_name(ADAPTER_FOLDER))
            model = load_model(self._settings, dtype=pick_dtype(self._settings.dtype), device=torch.device("cpu"))
            add_merged(model, self._adapted, weights)
            weights = model.state_dict()
        model.save_pretrained(aside, state_dict=weights)
        self.tokenizer.save_pretrained(aside)
        leave(aside)
        sync_tree(aside)
        aside.rename(folder)
        sync_folder(folder.parent)
