"""The training loop. It can be left after any step and continued from a checkpoint to bit-identical weights."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cifar_assets.training.augmentation import EpochAugmentation
from cifar_assets.training.checkpoint import Checkpoint, CheckpointStore
from cifar_assets.training.data import TrainingData
from cifar_assets.training.device import Processor, check_compiler
from cifar_assets.training.distributed import Processes
from cifar_assets.training.evaluate import Score, resize, score
from cifar_assets.training.finite import DivergedError, first_not_finite
from cifar_assets.training.networks import SpeedNet, build_network
from cifar_assets.training.order import epoch_batches, steps_per_epoch
from cifar_assets.training.schedule import rate_factor, resolution
from cifar_assets.training.spec import JobSpec
from cifar_assets.training.state import EpochRecord, Position, TrainingState
from cifar_assets.training.stopping import StopSignal, TrainingStopped
from resources.errors import ConfigError, DataError, StoreError

_LOG = logging.getLogger(__name__)
_AGREE_EVERY = 8
"""Steps between two questions whether any process was told to stop: each costs a message between all of them."""
_WHITENING_IMAGES = 5000


@dataclass
class Phases:
    """Seconds spent in each phase of this process's part of the training."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, since: float) -> float:
        """Count the time since a `time.perf_counter()` reading, and return the present reading."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - since
        return now


class Trainer:
    """One training job in one process.

    Args:
        spec: what to train, on what, how.
        data: the spec's dataset, opened.
        processor: device and precision.
        processes: this process's place among those that train together.
        checkpoints: written by rank 0, read by every rank.
        stop: set when the trainer is told to stop.
    """

    def __init__(
        self,
        spec: JobSpec,
        data: TrainingData,
        processor: Processor,
        processes: Processes,
        checkpoints: CheckpointStore,
        stop: StopSignal,
    ):
        self.phases = Phases()
        self.resumed_from: int | None = None
        self._spec = spec
        self._recipe = spec.recipe
        self._data = data
        self._processor = processor
        self._processes = processes
        self._checkpoints = checkpoints
        self._stop = stop
        self._steps = steps_per_epoch(len(data.train), spec.recipe.batch_size)
        self._check_batches()
        self._mean = _channels(data.manifest.mean, processor.device)
        self._std = _channels(data.manifest.std, processor.device)
        torch.manual_seed(spec.seed)
        self._network = self._build()
        self._published = self._build()
        self.state = TrainingState(self._network, spec.recipe, processor.dtype)
        self._saved_step: int | None = None
        self._resume()

    @property
    def global_step(self) -> int:
        """Optimizer steps done since the training began."""
        return self.state.position.epoch * self._steps + self.state.position.step

    def published(self) -> nn.Module:
        """The network to publish, in evaluation mode: with averaged weights where the recipe averages."""
        tensors = self.state.published_tensors()
        if self._processes.count > 1:
            # each process has batch norm statistics of its own; those of rank 0 are published
            self._processes.take_from_first(list(tensors.values()))
        self._published.load_state_dict(tensors)
        return self._published.eval()

    def train(self, on_step: Callable[[], None], on_epoch: Callable[[EpochRecord], None]) -> None:
        """Train from the present position to the end of the last epoch.

        `on_step` is called after every step, `on_epoch` after every epoch, on every rank. A checkpoint is passed over,
        with a warning, while the store is not reached. Raises TrainingStopped after a checkpoint when told to stop,
        DivergedError when the loss, the weights or the validation loss are not finite.
        """
        network = self._step_network()
        while self.state.position.epoch < self._recipe.epochs:
            self._train_epoch(network, on_step)
            on_epoch(self._finish_epoch())
            self._stop_if_told(ask=True)

    def _train_epoch(self, network: nn.Module, on_step: Callable[[], None]) -> None:
        position = self.state.position
        num_images = len(self._data.train)
        batches = epoch_batches(self._spec.seed, position.epoch, num_images, self._recipe.batch_size)
        augmentation = EpochAugmentation(self._recipe, self._spec.seed, position.epoch, num_images)
        network.train()
        before = time.perf_counter()
        while position.step < self._steps:
            self.step(network, batches[position.step], augmentation)
            position.step += 1
            self.state.update_average(self.global_step)
            now = self.phases.add("train", before)
            position.epoch_seconds += now - before
            on_step()
            self._stop_if_told(ask=position.step % _AGREE_EVERY == 0)
            every = self._spec.execution.checkpoint_every_steps
            if every and position.step % every == 0 and position.step < self._steps:
                self._save()
            before = time.perf_counter()

    def step(self, network: nn.Module, batch: NDArray[np.int64], augmentation: EpochAugmentation) -> None:
        """One optimizer step on this process's share of the batch, weighted so that every image counts the same."""
        factor = rate_factor(self._recipe, self.global_step, self._steps)
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            optimizer.zero_grad()
        indices = self._processes.share(batch)
        pixels = augmentation.shift_and_flip(self._data.train.images(indices), indices)
        pixels = self._normalize(pixels, resolution(self._recipe, self.global_step, self._steps))
        pixels = augmentation.cut_out(pixels, indices)
        with self._processor.autocast():
            logits = network(pixels.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(
            logits.float(),
            self._data.train.labels_at(indices),
            label_smoothing=self._recipe.label_smoothing,
            reduction="sum",
        )
        # DistributedDataParallel takes the mean over processes of what each brings
        (loss * (self._processes.count / len(batch))).backward()
        for optimizer in self.state.optimizers:
            optimizer.step()
        # a sum in float64 of this many float32 terms is exact, so that it is the same however a run is cut
        self.state.loss_sum += loss.detach()

    def _finish_epoch(self) -> EpochRecord:
        position = self.state.position
        loss_sum = self._processes.sum(self.state.loss_sum.clone()).item()
        self._check_finite({"the training loss": torch.tensor(loss_sum), **self.state.tensors()})
        before = time.perf_counter()
        size = resolution(self._recipe, self.global_step - 1, self._steps)
        validation = self._validate(size) if self._is_validated(position.epoch) else None
        self.phases.add("validate", before)
        record = EpochRecord(
            epoch=position.epoch,
            train_loss=loss_sum / len(self._data.train),
            validation_loss=validation.loss if validation else None,
            validation_accuracy=validation.accuracy if validation else None,
            learning_rate=self._recipe.learning_rate * rate_factor(self._recipe, self.global_step - 1, self._steps),
            resolution=size,
            seconds=position.epoch_seconds,
            images_per_second=len(self._data.train) / position.epoch_seconds,
        )
        position.history.append(record)
        position.epoch, position.step, position.epoch_seconds = position.epoch + 1, 0, 0.0
        self.state.loss_sum.zero_()
        self._save()
        return record

    def _is_validated(self, epoch: int) -> bool:
        return (epoch + 1) % self._recipe.validate_every == 0 or epoch + 1 == self._recipe.epochs

    def _validate(self, size: int) -> Score:
        """Measured at the size trained on: a network says little of pictures twice as large as any it has seen."""
        network = self.published()

        def classify(images: Tensor) -> Tensor:
            return network(self._normalize(images, size).contiguous(memory_format=torch.channels_last))

        found = score(classify, self._data.validation, self._processor, self._processes)
        self._check_finite({"the validation loss": torch.tensor(found.loss)})
        return found

    def _normalize(self, images: Tensor, size: int) -> Tensor:
        return resize((images.to(torch.float32) / 255 - self._mean) / self._std, size)

    def _stop_if_told(self, ask: bool) -> None:
        """Leave with a checkpoint when any process was told to stop. Processes ask one another only at agreed steps."""
        alone = self._processes.count == 1
        if not (alone or ask) or not self._processes.any(self._stop.is_set, self._processor.device):
            return
        self._save()
        raise TrainingStopped(
            f"Stopped after step {self.global_step} of {self._recipe.epochs * self._steps}: start the same spec again "
            "to continue from the last checkpoint."
        )

    def _save(self) -> None:
        if self._saved_step == self.global_step:
            return
        loss_sum = self._processes.sum(self.state.loss_sum.clone()).item()
        self._check_finite({"the training loss": torch.tensor(loss_sum), **self.state.tensors()})
        self._saved_step = self.global_step
        if not self._processes.is_first:
            return
        before = time.perf_counter()
        tensors = self.state.tensors() | {"loss_sum": torch.tensor(loss_sum, dtype=torch.float64)}
        try:
            position = self.state.position.to_json() | {"made_with": self._made_with()}
            self._checkpoints.save(self.global_step, tensors, position)
        except StoreError as error:
            if not error.transient:
                raise
            # an outage may be over by the next checkpoint, or by the end
            _LOG.warning("The checkpoint of step %d may be missing: %s", self.global_step, error)
        self.phases.add("checkpoint", before)

    def _resume(self) -> None:
        """Continue from the newest good checkpoint. Without one, start from weights drawn from the seed."""
        before = time.perf_counter()
        step = self._load_checkpoint()
        if step is not None:
            if not self._processes.is_first:
                self.state.loss_sum.zero_()
            self._saved_step = self.resumed_from = step
        elif isinstance(self._network, SpeedNet):
            images = self._data.train.images(np.arange(min(_WHITENING_IMAGES, len(self._data.train))))
            self._network.set_whitening(self._normalize(images, images.shape[-1]))
            self.state = TrainingState(self._network, self._recipe, self._processor.dtype)
        self.phases.add("resume", before)

    def _load_checkpoint(self) -> int | None:
        """Take over the same checkpoint in every process, the one rank 0 chooses, and return its step."""
        chosen = self._checkpoints.load_newest(self._take_over) if self._processes.is_first else None
        step = self._processes.from_first(-1 if chosen is None else chosen.step, self._processor.device)
        if step < 0:
            return None
        if not self._processes.is_first:
            self._take_over(self._checkpoints.load_step(step))
        return step

    def _take_over(self, checkpoint: Checkpoint) -> None:
        try:
            self.state.load(checkpoint.tensors, Position.from_json(checkpoint.position))
        except DataError as error:
            raise DataError(f"{checkpoint.uri} does not fit this training: {error}") from error
        made_with = checkpoint.position.get("made_with", self._made_with())
        if made_with != self._made_with() and self._processes.is_first:
            _LOG.warning(
                "The checkpoint of step %d was made with %s, this goes on with %s: the weights will not be those of a "
                "run that was never stopped.",
                checkpoint.step,
                made_with,
                self._made_with(),
            )

    def _made_with(self) -> dict[str, Any]:
        """What rounding depends on and the spec leaves open."""
        device, precision = self._processor.device.type, str(self._processor.dtype).removeprefix("torch.")
        return {"processes": self._processes.count, "device": device, "precision": precision}

    def _build(self) -> nn.Module:
        network = build_network(self._recipe)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = self._recipe.batch_norm_momentum
        return network.to(device=self._processor.device).to(memory_format=torch.channels_last)

    def _step_network(self) -> nn.Module:
        """The network as a step calls it: gradients shared between processes, compiled where that is asked for."""
        network = self._network
        if self._processes.count > 1:
            device = self._processor.device
            devices = [device] if device.type == "cuda" else None
            # Without it, messages hold the gradients in another order from the second step on, so that the sum of
            # three or more rounds otherwise after a continuation. torch warns that nothing is unused: that is meant.
            network = DistributedDataParallel(network, devices, find_unused_parameters=True)
        if self._spec.execution.compile:
            check_compiler()
            network = cast(nn.Module, torch.compile(network))
        return network

    def _check_batches(self) -> None:
        smallest = len(self._data.train) // self._steps
        if smallest < 2 * self._processes.count:
            raise ConfigError(
                f"Batches of {self._recipe.batch_size} of {len(self._data.train)} training images are too small for "
                f"{self._processes.count} processes: each needs two for batch norm. Raise batch_size or use fewer."
            )

    def _check_finite(self, tensors: dict[str, Tensor]) -> None:
        """Raise DivergedError in every process when a tensor of any process holds an infinity or NaN."""
        name = first_not_finite(tensors)
        if self._processes.any(name is not None, self._processor.device):
            when = f"in epoch {self.state.position.epoch + 1}, by step {self.global_step}"
            raise DivergedError(name or "a tensor of another process", when)


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32, device=device).view(1, 3, 1, 1)
