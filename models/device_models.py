"""A general network beside one for each of some recording devices, as the entries to DCASE 2025 Task 1 have them.

Source: F. Schmid et al., baseline of DCASE 2025 Task 1, https://github.com/CPJKU/dcase2025_task1_baseline, whose names
it keeps: `base_model.*`, `device_models.<device>.*`. Departure: clips of several devices in a batch go through the
networks device by device, not one by one; in eval mode the results are the same.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class DeviceModels(nn.Module):
    """Answers with the network of a clip's recording device; devices without one have the general network.

    Args:
        base_model: the general network.
        device_models: networks of the same kind, by recording device.
    """

    answers_by_device = True  # it wants to know the recording devices

    def __init__(self, base_model: nn.Module, device_models: Mapping[str, nn.Module]):
        super().__init__()
        self.base_model = base_model
        self.device_models = nn.ModuleDict(device_models)

    def for_device(self, device: str) -> nn.Module:
        """The network of a device, by its exact name."""
        return self.device_models[device] if device in self.device_models else self.base_model

    def forward(self, log_mel: Tensor, devices: Sequence[str] | None = None) -> Tensor:
        """Maps log-mel (batch, 1, mel, time) to logits (batch, class), before softmax.

        Args:
            devices: of the clips (batch,); None: the general network answers all.
        """
        if devices is None:
            return self.base_model(log_mel)
        if len(devices) != len(log_mel):
            raise ValueError(f"devices must name one for each of {len(log_mel)} clips, got {len(devices)}")
        groups: dict[str | None, list[int]] = {}
        for i, device in enumerate(devices):
            groups.setdefault(device if device in self.device_models else None, []).append(i)
        answers = {device: self.for_device(device or "")(log_mel[index]) for device, index in groups.items()}
        logits = next(iter(answers.values())).new_empty(len(devices), next(iter(answers.values())).shape[1])
        for device, index in groups.items():
            logits[index] = answers[device]
        return logits
