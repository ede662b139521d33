"""The training loop. It can stop after any step and continue from a checkpoint to bit-identical weights."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cifar_assets.training.checkpoint import Checkpoint, CheckpointStore, EpochRecord, TrainingState, first_not_finite
from cifar_assets.training.data import (
    EpochAugmentation,
    TrainingData,
    batch_images,
    epoch_batches,
    resize,
    resolution,
    steps_per_epoch,
)
from cifar_assets.training.device import Processor
from cifar_assets.training.distributed import Processes, StopSignal, TrainingStopped
from cifar_assets.training.networks import ResNet18, SpeedNet, build_network
from cifar_assets.training.optimizer import rate_factor
from cifar_assets.training.spec import JobSpec
from cifar_assets.training.start import Start, body_of
from resources.errors import ConfigError, DataError, StoreError

_LOG = logging.getLogger(__name__)
_AGREE_EVERY = 8
"""Steps after which the processes check whether any was asked to stop: each check costs an all-reduce."""
_AUGMENTED_BYTES = 24 << 20
_WHITENING_IMAGES, _WHITENING_PIXELS = 5000, 5000 * 32 * 32


class DivergedError(ConfigError):
    """The training produced infinities or NaN. It is deterministic, so the same spec fails again."""

    def __init__(self, what: str, when: str):
        super().__init__(
            f"The training diverged: {what} is not finite {when}. Lower learning_rate or raise warmup; an earlier "
            "checkpoint is kept but leads to the same failure."
        )


class Trainer:
    """One training job in one process. Checkpoints are written by rank 0 and read by every rank."""

    def __init__(
        self,
        spec: JobSpec,
        data: TrainingData,
        processor: Processor,
        processes: Processes,
        checkpoints: CheckpointStore,
        stop: StopSignal,
    ):
        self.spec = spec
        self.data = data
        self.processor = processor
        self.processes = processes
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.resumed_from: int | None = None
        self._recipe = spec.recipe
        self._image_size = data.manifest.image_size
        self._checkpoints = checkpoints
        self._stop = stop
        self._steps = steps_per_epoch(len(data.train), spec.recipe.batch_size)
        spec.recipe.check_fits(data.manifest, len(data.train))
        self._check_batches()
        self._mean = _channels(data.manifest.mean, processor.device)
        self._std = _channels(data.manifest.std, processor.device)
        torch.manual_seed(spec.seed)
        network = build_network(spec.recipe, data.manifest).to(processor.device).to(memory_format=torch.channels_last)
        self.state = TrainingState(network, spec.recipe, processor.dtype)
        self._saved_step: int | None = None
        with self.timed("resume"):
            self._resume()

    @property
    def global_step(self) -> int:
        """Optimizer steps done since the training began."""
        return self.state.position.epoch * self._steps + self.state.position.step

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the duration of the block to a phase."""
        before = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - before

    def published(self) -> nn.Module:
        """The network in evaluation mode, with the batch norm statistics of rank 0; they differ by rank."""
        for buffer in self.state.network.buffers():
            self.processes.broadcast(buffer)
        return self.state.network.eval()

    def train(self, on_epoch: Callable[[EpochRecord], None]) -> None:
        """Train from the current position to the end of the last epoch; `on_epoch` is called on every rank.

        A checkpoint is skipped, with a warning, while the store is not reachable. Raises TrainingStopped after a
        checkpoint when asked to stop, DivergedError when the loss, the weights or the validation loss are not finite.
        """
        network = self._step_network()
        while self.state.position.epoch < self._recipe.epochs:
            self._train_epoch(network)
            on_epoch(self._finish_epoch())
            self._stop_if_told(ask=True)

    def _train_epoch(self, network: nn.Module) -> None:
        position = self.state.position
        num_images = len(self.data.train)
        batches = epoch_batches(self.spec.seed, position.epoch, num_images, self._recipe.batch_size)
        augmentation = EpochAugmentation(self._recipe, self.spec.seed, position.epoch, num_images, self._image_size)
        every = self.spec.execution.checkpoint_every_steps
        network.train()
        while position.step < self._steps:
            before = time.perf_counter()
            self.step(network, batches[position.step], augmentation)
            position.step += 1
            position.epoch_seconds += time.perf_counter() - before
            self.seconds["train"] += time.perf_counter() - before
            self._stop_if_told(ask=position.step % _AGREE_EVERY == 0)
            if every and position.step % every == 0 and position.step < self._steps:
                self._save()

    def step(self, network: nn.Module, batch: NDArray[np.int64], augmentation: EpochAugmentation) -> None:
        """One optimizer step on this process's part of the batch, weighted so that every image counts the same."""
        factor = rate_factor(self._recipe, self.global_step, self._steps)
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            optimizer.zero_grad()
        indices = self.processes.part_of(batch)
        pixels = self._augmented(indices, augmentation)
        with self.processor.autocast():
            logits = network(pixels.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(
            logits.float(),
            self.data.train.labels_at(indices),
            label_smoothing=self._recipe.label_smoothing,
            reduction="sum",
        )
        # DistributedDataParallel averages the gradients over processes
        (loss * (self.processes.world_size / len(batch))).backward()
        for optimizer in self.state.optimizers:
            optimizer.step()
        # a float64 sum of this many float32 terms is exact, so it does not depend on where a run was interrupted
        self.state.loss_sum += loss.detach()

    def _finish_epoch(self) -> EpochRecord:
        position = self.state.position
        loss_sum = self._checked_loss_sum()
        size = self._resolution(self.global_step - 1)
        done = position.epoch + 1
        is_validated = done % self._recipe.validate_every == 0 or done == self._recipe.epochs
        with self.timed("validate"):
            loss, accuracy = self._validate(size) if is_validated else (None, None)
        record = EpochRecord(
            epoch=position.epoch,
            train_loss=loss_sum / len(self.data.train),
            validation_loss=loss,
            validation_accuracy=accuracy,
            learning_rate=self._recipe.learning_rate * rate_factor(self._recipe, self.global_step - 1, self._steps),
            resolution=size,
            seconds=position.epoch_seconds,
            images_per_second=len(self.data.train) / position.epoch_seconds,
        )
        position.history.append(record)
        position.epoch, position.step, position.epoch_seconds = done, 0, 0.0
        self.state.loss_sum.zero_()
        self._save()
        return record

    def _validate(self, size: int) -> tuple[float, float]:
        """Mean cross-entropy in nats and accuracy; each process measures its part.

        Uses the current training size: a network performs poorly on images twice as large as those it was trained on.
        """
        network, split = self.published(), self.data.validation
        batch = batch_images(self._image_size) * self.processes.world_size
        sums = torch.zeros(2, dtype=torch.float64, device=self.processor.device)
        for start in range(0, len(split), batch):
            indices = self.processes.part_of(np.arange(start, min(start + batch, len(split))))
            if not len(indices):
                continue
            labels = split.labels_at(indices)
            with torch.inference_mode(), self.processor.autocast():
                pixels = self._normalize(split.images(indices), size)
                logits = network(pixels.contiguous(memory_format=torch.channels_last)).float()
            sums[0] += functional.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (logits.argmax(1) == labels).sum()
        loss, accuracy = (self.processes.all_reduce(sums) / len(split)).tolist()
        self._check_finite({"the validation loss": torch.tensor(loss)})
        return loss, accuracy

    def _resolution(self, step: int) -> int:
        return resolution(self._recipe, step, self._steps, self._image_size)

    def _augmented(self, indices: NDArray[np.int64], augmentation: EpochAugmentation) -> Tensor:
        """Normalized images for a step, made a few megabytes at a time."""
        size, parts = self._resolution(self.global_step), []
        num_bytes = len(indices) * math.prod(self.data.manifest.image_shape)
        for part in np.array_split(indices, max(1, -(-num_bytes // _AUGMENTED_BYTES))):
            pixels = augmentation.shift_and_flip(self.data.train.images(part), part)
            parts.append(augmentation.cut_out(self._normalize(pixels, size), part))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _normalize(self, images: Tensor, size: int) -> Tensor:
        return resize((images.to(torch.float32) / 255 - self._mean) / self._std, size)

    def _stop_if_told(self, ask: bool) -> None:
        """Stop with a checkpoint if any process was asked to stop. The processes check this only at fixed steps."""
        alone = self.processes.world_size == 1
        if not (alone or ask) or not self.processes.any(self._stop.is_set, self.processor.device):
            return
        self._save()
        raise TrainingStopped(
            f"Stopped after step {self.global_step} of {self._recipe.epochs * self._steps}: start the same spec again "
            "to continue from the last checkpoint."
        )

    def _save(self) -> None:
        if self._saved_step == self.global_step:
            return
        tensors = self.state.tensors() | {"loss_sum": torch.tensor(self._checked_loss_sum(), dtype=torch.float64)}
        self._saved_step = self.global_step
        if self.processes.rank:
            return
        self.state.position.made_with = self._made_with()
        try:
            with self.timed("checkpoint"):
                self._checkpoints.save(self.global_step, tensors, self.state.position)
        except StoreError as error:
            if not error.transient:
                raise
            # the outage may end before the next checkpoint or the end of the training
            _LOG.warning("The checkpoint of step %d may not be stored: %s", self.global_step, error)

    def _resume(self) -> None:
        """Continue from the newest valid checkpoint, which rank 0 chooses, otherwise begin with the first weights."""
        chosen = self._checkpoints.load_newest(self._take_over) if self.processes.rank == 0 else None
        step = torch.tensor(-1 if chosen is None else chosen.step, device=self.processor.device)
        step = int(self.processes.broadcast(step).item())
        if step >= 0:
            if self.processes.rank:
                self._take_over(self._checkpoints.load_step(step))
                self.state.loss_sum.zero_()
            self._saved_step = self.resumed_from = step
        elif isinstance(self.state.network, SpeedNet):
            most = min(_WHITENING_IMAGES, _WHITENING_PIXELS // self._image_size**2, len(self.data.train))
            images = self.data.train.images(np.arange(most))
            self.state.network.set_whitening(self._normalize(images, images.shape[-1]))
        elif self.spec.start and isinstance(self.state.network, ResNet18):
            self._start_from(self.spec.start, self.state.network)

    def _start_from(self, start: Start, network: ResNet18) -> None:
        body = body_of(load(start.read(self._recipe.width)))
        if (name := first_not_finite(body)) is not None:
            raise DataError(f"{start.uri}: {name} contains numbers that are not finite. Start from other weights.")
        network.take_over(body)
        _LOG.info("Starting from the weights in %s", start.uri)

    def _take_over(self, checkpoint: Checkpoint) -> None:
        self.state.load(checkpoint.tensors, checkpoint.position)
        made_with = checkpoint.position.made_with or self._made_with()
        if made_with != self._made_with():
            _LOG.warning(
                "The checkpoint of step %d was made with %s, this training continues with %s: the weights will "
                "differ from those of an uninterrupted run.",
                *(checkpoint.step, made_with, self._made_with()),
            )

    def _made_with(self) -> dict[str, Any]:
        """What rounding depends on and the spec leaves open."""
        device, precision = self.processor.device.type, self.processor.precision
        return {"processes": self.processes.world_size, "device": device, "precision": precision}

    def _step_network(self) -> nn.Module:
        """The network as called in a step: gradients are averaged over the processes."""
        if self.processes.world_size == 1:
            return self.state.network
        devices = [self.processor.device] if self.processor.device.type == "cuda" else None
        # Without find_unused_parameters, DDP reorders its buckets after the first step, so that after a continuation
        # the sum over three or more processes would round differently. torch warns that no parameter is unused.
        return DistributedDataParallel(self.state.network, devices, find_unused_parameters=True)

    def _check_batches(self) -> None:
        smallest = len(self.data.train) // self._steps
        if smallest < 2 * self.processes.world_size:
            raise ConfigError(
                f"Batches of {self._recipe.batch_size} of {len(self.data.train)} training images are too small for "
                f"{self.processes.world_size} processes: each needs two for batch norm. "
                "Raise batch_size or use fewer processes."
            )

    def _checked_loss_sum(self) -> float:
        """Sum of this epoch's losses over all processes. Raises DivergedError if it or the state is not finite."""
        loss_sum = self.processes.all_reduce(self.state.loss_sum.clone()).item()
        self._check_finite({"the training loss": torch.tensor(loss_sum), **self.state.tensors()})
        return loss_sum

    def _check_finite(self, tensors: dict[str, Tensor]) -> None:
        """Raise DivergedError in every process if a tensor of any process contains an infinity or NaN."""
        name = first_not_finite(tensors)
        if self.processes.any(name is not None, self.processor.device):
            when = f"in epoch {self.state.position.epoch + 1}, by step {self.global_step}"
            raise DivergedError(name or "a tensor of another process", when)


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32, device=device).view(1, 3, 1, 1)
