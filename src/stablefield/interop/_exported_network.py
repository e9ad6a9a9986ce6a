"""The network of an export as a diffusers model: the diffusers part of `network.py`.

An exported `network.py` is this file preceded by the stablefield modules that it imports. The model always has EDM's
preconditioning, so that diffusers' EDM schedulers apply. A network trained in another one is converted, which is exact,
because both wrap the network in affine functions:

    F_edm = (D - c_skip x) / c_out = ((skip - c_skip) x + out F) / c_out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from stablefield._shapes import per_row
from stablefield.diffusion._preconditioning import PRECONDITIONINGS, EDMPreconditioning, Preconditioning
from stablefield.networks._mlp import MLP
from stablefield.networks._sit import SiT
from stablefield.networks._song_unet import SongUNet

__all__ = ["StablefieldOutput", "StablefieldUNet"]


@dataclass
class StablefieldOutput(BaseOutput):
    """The model's output: `sample`, shape (B, C, H, W)."""

    sample: Tensor


class StablefieldUNet(ModelMixin, ConfigMixin):
    """A DDPM++ or NCSN++ U-Net, a SiT or a perceptron, in EDM's preconditioning.

    Args:
        kind: "unet", "sit" or "perceptron".
        options: arguments of the network.
        in_channels: of the images.
        sample_size: height and width of the images.
        num_classes: the number of classes; 0 for none.
        sigma_data: of EDM's preconditioning, as in the scheduler.
        preconditioning: the one that the network was trained with: "edm", "vp", "ve", "flow" or
            "ddpm".
        preconditioning_options: its arguments.
    """

    network: torch.nn.Module
    # Read by diffusers: weights of 16 bits keep their frequencies in float32.
    _keep_in_fp32_modules = ["freqs"]  # noqa: RUF012, as in the base class

    @register_to_config
    def __init__(
        self,
        kind: str,
        options: dict[str, Any],
        in_channels: int,
        sample_size: list[int],
        num_classes: int = 0,
        sigma_data: float = 0.5,
        preconditioning: str = "edm",
        preconditioning_options: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        match kind:
            case "unet":
                self.network = SongUNet(**options)
            case "sit":
                self.network = SiT(**options)
            case _:
                self.network = MLP((in_channels, *sample_size), **options)
        arguments: dict[str, Any] = preconditioning_options or {}
        self._edm = EDMPreconditioning(sigma_data)
        self._trained: Preconditioning | None = None
        if preconditioning != "edm":
            self._trained = PRECONDITIONINGS[preconditioning](**arguments)
        self.num_classes, self.in_channels = num_classes, in_channels

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> StablefieldOutput | tuple[Tensor]:
        """Map images scaled by c_in to EDM's F.

        Args:
            sample: c_in x, shape (B, C, H, W).
            timestep: ln(sigma) / 4, a number or shape (B,).
            class_labels: integers (B,), -1 for no class.
            return_dict: return an object with `sample`, or a tuple.
        """
        label = torch.as_tensor(timestep, device=sample.device)
        # 16 bits cannot tell neighbouring noise levels apart, and the networks take labels in float32.
        label = label.to(torch.promote_types(sample.dtype, torch.float32)).reshape(-1).expand(len(sample))
        arguments = {} if class_labels is None or not self.num_classes else {"class_labels": class_labels}
        if self._trained is None:
            raw = self.network(sample, label, **arguments)
        else:
            sigma = torch.exp(4 * label)
            edm, trained = self._edm(sigma), self._trained(sigma)
            x = sample / per_row(edm.c_in, sample)
            raw = self.network(per_row(trained.c_in, x) * x, trained.c_noise, **arguments)
            skip, out = (trained.c_skip - edm.c_skip) / edm.c_out, trained.c_out / edm.c_out
            raw = per_row(skip, x) * x + per_row(out, x) * raw
        return StablefieldOutput(sample=raw) if return_dict else (raw,)
